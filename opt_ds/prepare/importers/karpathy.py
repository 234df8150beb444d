"""COCO captions and Flickr30k in Karpathy's splits (dataset_coco.json, dataset_flickr30k.json; Karpathy & Fei-Fei 2015),
and Flickr30k's own token file (`1000092795.jpg#0`, tab, caption). Each caption is a sample; a picture's share its row.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from opt_ds.errors import UserError
from opt_ds.prepare.importers.common import Files, read_json, read_rows, sample, write_import
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
    for number, picture in enumerate(content["images"]):
        try:
            name, split, sentences = picture["filename"], picture["split"], picture["sentences"]
            captions = [(sentence["sentid"], sentence["raw"]) for sentence in sentences]
        except (KeyError, TypeError) as error:
            yield Skipped(f"image {number}", f"not as published: no {error.args[0]}")
            continue
        below = f"{picture['filepath']}/{name}" if picture.get("filepath") else name
        file = pictures.get(below) or pictures.get(name) or pictures.by_stem(Path(name).stem)
        for identifier, caption in captions:
            yield sample(
                f"sentence {identifier}",
                text=caption,
                files={"image": (below, file)},
                group=f"image {name}",
                split=_SPLITS.get(split, split),
            )


def _token_entries(annotations: Path, pictures: Files) -> Iterator[ManifestLine | Skipped]:
    for number, row in enumerate(read_rows(annotations, "\t"), 1):
        name = row[0].rpartition("#")[0] if len(row) == 2 else ""
        if not name:
            yield Skipped(f"line {number}", f"not name#number and caption: {annotations.name} line {number}")
            continue
        yield sample(row[0], text=row[1], files={"image": (name, pictures.get(name))}, group=f"image {name}")
