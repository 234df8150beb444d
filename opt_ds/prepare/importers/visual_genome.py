"""Visual Genome (Krishna et al. 2017): region_descriptions.json, and image_data.json for the pictures' files.

Each region's phrase is a sample with the whole picture, as UNITER takes it; the phrases of a picture share its row.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.prepare.importers.common import Files, guarded, read_json, read_json_array, sample, write_import
from opt_ds.prepare.manifest import ManifestLine, Skipped


def import_visual_genome(
    annotations: Path,
    output: Path,
    *,
    images: Path,
    image_data: Path | None = None,
    leave_out: Path | None = None,
    max_phrases: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the manifest `output`. `images`: the folder that holds VG_100K and VG_100K_2, or all pictures.

    `image_data`: needed for `leave_out`, a Karpathy COCO split whose validation and test pictures are left out (half of
    Visual Genome's pictures are COCO's). `max_phrases`: at most so many of a picture, evenly spread. UserError for
    `leave_out` alone, and for files that are not as published.
    """
    if leave_out is not None and image_data is None:
        raise UserError("--leave-out: only --image-data tells which pictures are COCO's: give image_data.json too")
    pictures = Files(images, output, "image")
    coco_ids = _coco_ids(image_data) if image_data is not None else {}
    held_out = _held_out(leave_out) if leave_out is not None else set()
    entries = _entries(annotations, pictures, coco_ids, held_out, max_phrases)
    return write_import(output, entries, say, source=str(annotations))


def _entries(
    annotations: Path,
    pictures: Files,
    coco_ids: dict[int, int],
    held_out: set[int],
    max_phrases: int | None,
) -> Iterator[ManifestLine | Skipped]:
    def phrases(picture: dict[str, Any]) -> Iterator[ManifestLine | Skipped]:
        image_id, regions = picture["id"], picture["regions"]
        file = pictures.by_stem(str(image_id))
        if coco_ids.get(image_id) in held_out:
            yield Skipped(f"image {image_id}", "held out for COCO's evaluation")
        elif file is None:
            yield Skipped(f"image {image_id}", f"image file is missing: {image_id}.jpg")
        else:
            step = 1 if max_phrases is None else max(1, -(-len(regions) // max_phrases))
            for region in regions[::step]:
                id = f"region {region['region_id']}"
                files: dict[str, tuple[str, str | None] | None] = {"image": (str(image_id), file)}
                yield sample(id, text=region["phrase"], files=files, group=f"image {image_id}")

    for number, picture in enumerate(read_json_array(annotations)):
        yield from guarded(f"{annotations.name} entry {number}", lambda picture=picture: phrases(picture))  # type: ignore[misc]


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
