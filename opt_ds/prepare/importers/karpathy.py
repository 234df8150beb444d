"""COCO captions and Flickr30k in Karpathy's splits (dataset_coco.json, dataset_flickr30k.json; Karpathy & Fei-Fei 2015),
and Flickr30k's own token file (`1000092795.jpg#0`, tab, caption). Each caption is a sample; a picture's share its row.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.prepare.importers.common import Files, guarded, read_json, read_rows, sample, write_import
from opt_ds.prepare.manifest import ManifestLine, Skipped

_SPLITS = {"train": "train", "restval": "train", "val": "valid", "test": "test"}


def import_karpathy(
    annotations: Path, output: Path, *, images: Path, say: Callable[[str], None] = print
) -> Path:
    """Write the manifest `output` of a Karpathy split JSON, or of Flickr30k's token file (without splits).

    `images`: the folder of the pictures; COCO's may lie in train2014 and val2014 below it.
    """
    pictures = Files(images, output, "image")
    entries = _entries(annotations, pictures) if annotations.suffix == ".json" else _token_entries(annotations, pictures)
    return write_import(output, entries, say, source=str(annotations))


def _entries(annotations: Path, pictures: Files) -> Iterator[ManifestLine | Skipped]:
    content = read_json(annotations)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f'{annotations}: no list "images": give a Karpathy split JSON')

    def captions(picture: dict[str, Any]) -> Iterator[ManifestLine | Skipped]:
        name, split = picture["filename"], picture["split"]
        below = f"{picture['filepath']}/{name}" if picture.get("filepath") else name
        file = pictures.get(below) or pictures.get(name) or pictures.by_stem(Path(name).stem)
        for sentence in picture["sentences"]:
            yield sample(
                f"sentence {sentence['sentid']}",
                text=sentence["raw"],
                files={"image": (below, file)},
                group=f"image {name}",
                split=_SPLITS.get(split, split),
            )

    for number, picture in enumerate(content["images"]):
        yield from guarded(f"image {number}", lambda picture=picture: captions(picture))  # type: ignore[misc]


def _token_entries(annotations: Path, pictures: Files) -> Iterator[ManifestLine | Skipped]:
    for number, row in enumerate(read_rows(annotations, "\t"), 1):
        name = row[0].rpartition("#")[0] if len(row) == 2 else ""
        if not name:
            yield Skipped(f"line {number}", f"not name#number and caption: {annotations.name} line {number}")
            continue
        yield sample(row[0], text=row[1], files={"image": (name, pictures.get(name))}, group=f"image {name}")
