"""COCO captions and Flickr30k in Karpathy's splits, and Flickr30k's own token file.

The splits are dataset_coco.json and dataset_flickr30k.json (Karpathy & Fei-Fei 2015). The token file has lines of
`1000092795.jpg#0`, tab, caption. Each caption is a sample. The captions of an image share its row.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import (
    Entry,
    guarded,
    prefixes,
    sample,
    split_of_name,
    typed,
    unused_files,
    write_import,
)
from opt_ds.ingest.importers.files import Files
from opt_ds.ingest.importers.tables import read_rows
from opt_ds.ingest.manifest import Skipped
from opt_ds.ingest.text_files import open_text, read_json

_COCO_NAME = re.compile(r"COCO_[a-z0-9]+_(\d{12})\.\w+")
_TOKEN = re.compile(r"(.+)#\d+")


def import_karpathy(annotations: Path | Sequence[Path], output: Path, *, images: Path) -> Path:
    """Write the manifest `output` for Karpathy split JSON files, or for Flickr30k's token file (without splits).

    `images` is the folder of the images. COCO's may be in its subfolders train2014 and val2014. With several files, ids
    are prefixed with the name of their file.
    """
    paths = [annotations] if isinstance(annotations, Path) else list(annotations)
    image_files = Files(images, output, "image")

    def entries() -> Iterator[Entry]:
        for path, prefix in zip(paths, prefixes(paths), strict=True):
            yield from (_entries if _is_json(path) else _token_entries)(path, image_files, prefix)
        yield from unused_files([image_files])

    return write_import(output, entries(), source=", ".join(map(str, paths)))


def _is_json(path: Path) -> bool:
    with open_text(path) as file:
        return path.name.removesuffix(".gz").endswith(".json") or file.read(1024).lstrip().startswith(("{", "["))


def _entries(annotations: Path, image_files: Files, prefix: str) -> Iterator[Entry]:
    content = read_json(annotations)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f'{annotations}: no list "images": give a Karpathy split JSON')

    def caption(image: dict[str, Any], sentence: dict[str, Any]) -> Iterator[Entry]:
        id = f"{prefix}sentence {typed(sentence['sentid'], (int, str), 'sentid')}"
        own, imgid = sentence.get("imgid"), image.get("imgid")
        if own is not None and imgid is not None and own != imgid:
            yield Skipped(id, f"it contradicts itself: its imgid is {own}, its image's {imgid}")
            return
        name, split = typed(image["filename"], str, "filename"), typed(image["split"], str, "split")
        below = f"{typed(image['filepath'], str, 'filepath')}/{name}" if image.get("filepath") else name
        file = image_files.get(below) or image_files.get(name) or image_files.by_stem(Path(name).stem)
        yield sample(
            id,
            text=typed(sentence["raw"], str, "raw"),
            files={"image": (below, file)},
            group=f"{prefix}image {name}",
            split="train" if split == "restval" else split_of_name(split) or split,
        )

    def captions(place: str, image: dict[str, Any]) -> Iterator[Entry]:
        wrong = _contradiction(image)
        if wrong is not None:
            yield Skipped(place, wrong)
            return
        for name in ("split", "filename"):
            image[name]
        for number, sentence in enumerate(image["sentences"]):
            yield from guarded(f"{place} sentence {number}", lambda sentence=sentence: caption(image, sentence))  # type: ignore[misc]

    for number, image in enumerate(content["images"]):
        place = f"{prefix}image {number}"
        yield from guarded(place, lambda place=place, image=image: captions(place, image))  # type: ignore[misc]


def _contradiction(image: dict[str, Any]) -> str | None:
    """Return the contradiction if the image number in a COCO file name differs from the entry's; else None."""
    match = _COCO_NAME.fullmatch(str(image.get("filename")))
    if match and isinstance(image.get("cocoid"), int) and int(match[1]) != image["cocoid"]:
        return f"it contradicts itself: cocoid is {image['cocoid']}, its file is {image['filename']}"
    return None


def _token_entries(annotations: Path, image_files: Files, prefix: str) -> Iterator[Entry]:
    for row in read_rows(annotations, "\t", quoted=False):
        match = _TOKEN.fullmatch(row.cells[0]) if len(row.cells) == 2 else None
        if match is None:
            place = f"line {row.line}"
            yield Skipped(prefix + place, f"not name#number and caption: {annotations.name} {place}")
            continue
        yield sample(
            prefix + row.cells[0],
            text=row.cells[1],
            files={"image": (match[1], image_files.get_or_problem(match[1], "image"))},
            group=f"{prefix}image {match[1]}",
        )
