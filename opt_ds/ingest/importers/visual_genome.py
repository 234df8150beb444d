"""Visual Genome (Krishna et al. 2017): region_descriptions.json, and image_data.json for the image files.

As in UNITER, the phrase of each region is a sample with the complete image. The phrases of an image share its row.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import Entry, Unused, guarded, prefixes, sample, typed, unused_files, write_import
from opt_ds.ingest.importers.files import Files, Problem
from opt_ds.ingest.manifest import Skipped
from opt_ds.ingest.text_files import read_json, read_json_array


def import_visual_genome(
    annotations: Path | Sequence[Path],
    output: Path,
    *,
    images: Path,
    image_data: Path | None = None,
    leave_out: Path | None = None,
    max_phrases: int | None = None,
) -> Path:
    """Write the manifest `output`. With several files, ids are prefixed with the name of their file.

    Args:
        annotations: region_descriptions.json files.
        output: The manifest to write.
        images: The folder that contains VG_100K and VG_100K_2, or all images.
        image_data: image_data.json; required by `leave_out`.
        leave_out: A Karpathy COCO split whose validation and test images are left out (half of Visual Genome's images
            are from COCO).
        max_phrases: Largest number of phrases per image, evenly spaced.

    Raises:
        UserError: `leave_out` is given without `image_data`, or a file does not have the published form.
    """
    if leave_out is not None and image_data is None:
        raise UserError("--leave-out requires --image-data, which lists COCO's images: give image_data.json too")
    paths = [annotations] if isinstance(annotations, Path) else list(annotations)
    image_files = Files(images, output, "image")
    coco_ids = _coco_ids(image_data) if image_data is not None else {}
    held_out = _held_out(leave_out) if leave_out is not None else set()

    def entries() -> Iterator[Entry]:
        for path, prefix in zip(paths, prefixes(paths), strict=True):
            yield from _entries(path, prefix, image_files, coco_ids, held_out, max_phrases)
        yield from unused_files([image_files])

    return write_import(output, entries(), source=", ".join(map(str, paths)))


def _entries(
    annotations: Path,
    prefix: str,
    image_files: Files,
    coco_ids: dict[int, int],
    held_out: set[int],
    max_phrases: int | None,
) -> Iterator[Entry]:
    passed_over = 0

    def phrase(region: dict[str, Any], image_id: int, file: str) -> Iterator[Entry]:
        id = f"{prefix}region {typed(region['region_id'], (int, str), 'region_id')}"
        if region.get("image_id", image_id) != image_id:
            reason = f"it contradicts itself: its image_id is {region['image_id']}, its image's id {image_id}"
            yield Skipped(id, reason)
            return
        text = typed(region["phrase"], str, "phrase")
        yield sample(id, text=text, files={"image": (str(image_id), file)}, group=f"image {image_id}")

    def phrases(place: str, image: dict[str, Any]) -> Iterator[Entry]:
        nonlocal passed_over
        image_id, regions = typed(image["id"], (int, str), "id"), typed(image["regions"], list, "regions")
        file = image_files.by_stem(str(image_id))
        if coco_ids.get(image_id) in held_out:
            yield Skipped(f"image {image_id}", "held out for COCO's evaluation")
        elif isinstance(file, Problem):
            yield Skipped(f"image {image_id}", file.reason)
        elif file is None:
            yield Skipped(f"image {image_id}", f"image file is missing: {image_id}.jpg")
        else:
            step = 1 if max_phrases is None else max(1, -(-len(regions) // max_phrases))
            passed_over += len(regions) - len(regions[::step])
            for number, region in enumerate(regions[::step]):
                name = f"{place} region {number * step}"
                yield from guarded(name, lambda region=region: phrase(region, image_id, file))  # type: ignore[misc]

    for number, image in enumerate(read_json_array(annotations)):
        place = f"{annotations.name} entry {number}"
        yield from guarded(place, lambda place=place, image=image: phrases(place, image))  # type: ignore[misc]
    if passed_over:
        yield Unused("phrases", passed_over, why="beyond --max-phrases")


def _coco_ids(image_data: Path) -> dict[int, int]:
    content = read_json(image_data)
    try:
        return {entry["image_id"]: entry["coco_id"] for entry in content if entry.get("coco_id") is not None}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{image_data}: no list of "image_id" and "coco_id": give image_data.json as published') from None


def _held_out(karpathy: Path) -> set[int]:
    content = read_json(karpathy)
    try:
        return {entry["cocoid"] for entry in content["images"] if entry["split"] in ("val", "test")}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{karpathy}: no "images" with "cocoid" and "split": give dataset_coco.json as published') from None
