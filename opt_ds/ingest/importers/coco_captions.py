"""COCO's own captions_train2017.json and captions_val2017.json (Chen et al. 2015), also of 2014.

`images` has id and file_name, `annotations` has id, image_id and caption. Each caption is a sample. The captions of an
image share its row. Karpathy's splits are another file (karpathy.py).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import Entry, Unused, guarded, sample, split_of_file, typed
from opt_ds.ingest.importers.files import Files
from opt_ds.ingest.manifest import Skipped


def is_coco_captions(content: Any) -> bool:
    """Return whether a JSON value has the form of COCO's captions, and not that of Karpathy's splits."""
    return isinstance(content, dict) and isinstance(content.get("annotations"), list)


def coco_entries(annotations: Path, content: dict[str, Any], image_files: Files, prefix: str) -> Iterator[Entry]:
    """Yield the samples of a file of captions. The split is that of the file's name.

    Args:
        annotations: The file, for messages.
        content: Its content.
        image_files: The folder of the images.
        prefix: What the ids begin with.

    Raises:
        UserError: The file has no list of images, or its annotations are not captions.
    """
    names, twice = _names(annotations, content)
    split = split_of_file(annotations)
    captioned: set[int] = set()

    def caption(annotation: dict[str, Any]) -> Iterator[Entry]:
        id = f"{prefix}annotation {typed(annotation['id'], int, 'id')}"
        image = typed(annotation["image_id"], int, "image_id")
        text = typed(annotation["caption"], str, "caption").strip()
        if image not in names or image in twice:
            yield Skipped(id, f"image {image} is {'listed twice' if image in twice else 'not listed'} in the file")
            return
        captioned.add(image)
        name = names[image]
        found = image_files.get(name) or image_files.by_stem(Path(name).stem)
        yield sample(id, text=text, files={"image": (name, found)}, group=f"{prefix}image {name}", split=split)

    for number, annotation in enumerate(content["annotations"]):
        yield from guarded(f"{prefix}entry {number}", lambda annotation=annotation: caption(annotation))  # type: ignore[misc]
    left = [names[image] for image in names if image not in captioned]
    if left:
        yield Unused("images", len(left), tuple(left), f"of {annotations.name}, they have no caption")


def _names(annotations: Path, content: dict[str, Any]) -> tuple[dict[int, str], set[int]]:
    """Return image id -> file name, and the ids that are listed with several names."""
    images, captions = content.get("images"), content["annotations"]
    if not isinstance(images, list):
        raise UserError(f'{annotations}: no list "images": give captions_….json, whose images have id and file_name')
    if captions and not any(isinstance(each, dict) and "caption" in each for each in captions):
        raise UserError(f"{annotations}: its annotations have no caption: give captions_….json, not instances_… or others")
    names: dict[int, str] = {}
    twice: set[int] = set()
    for image in images:
        id, name = (image.get("id"), image.get("file_name")) if isinstance(image, dict) else (None, None)
        if isinstance(id, int) and isinstance(name, str) and name:
            twice |= {id} if names.get(id, name) != name else set()
            names[id] = name
    return names, twice
