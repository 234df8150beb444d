"""Lists of images and captions as BLIP (Li et al. 2022) and LAVIS publish them: coco_karpathy_train.json, vg_caption.json.

A JSON array of objects with `image`, a path, and `caption`, a text or a list of texts. Each caption is a sample. The
captions of an image share its row.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opt_ds.ingest.importers.captions import captions_of, samples_of_captions
from opt_ds.ingest.importers.common import (
    Entry,
    Unused,
    guarded,
    prefixes,
    split_and_file,
    split_of_file,
    typed,
    unused_files,
    write_import,
)
from opt_ds.ingest.importers.files import Files, Found
from opt_ds.ingest.text_files import read_json_array

_FIELDS = ("image", "caption")


def import_blip(annotations: Sequence[str], output: Path, *, images: Path) -> Path:
    """Write the manifest `output`.

    Args:
        annotations: JSON files, each FILE or SPLIT=FILE. Without SPLIT, a split in the name of the file is used.
        output: The manifest to write.
        images: The folder that the paths of the images are relative to. The first folders of a path may be missing there.
    """
    files = [split_and_file(each) for each in annotations]
    image_files = Files(images, output, "image")
    fields: Counter[str] = Counter()

    def samples(id: str, entry: dict[str, Any], split: str | None) -> Iterator[Entry]:
        name = typed(entry["image"], str, "image")
        found = _find(image_files, name)
        texts = captions_of(entry["caption"], "caption")
        fields.update(key for key in entry if key not in _FIELDS)
        yield from samples_of_captions(id, texts, files={"image": (name, found)}, group=f"image {name}", split=split)

    def entries() -> Iterator[Entry]:
        for (split, path), prefix in zip(files, prefixes([path for _, path in files]), strict=True):
            for number, entry in enumerate(read_json_array(path)):
                id = f"{prefix}entry {number}"
                yield from guarded(id, partial(samples, id, entry, split or split_of_file(path)))
        if fields:
            yield Unused("fields", len(fields), tuple(sorted(fields)))
        yield from unused_files([image_files])

    return write_import(output, entries(), source=", ".join(annotations))


def _find(image_files: Files, name: str) -> Found:
    """Return the image with this path, or with the end of it: vg/1.jpg and 1.jpg for /export/share/vg/1.jpg."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    found = next((found for end in ends if (found := image_files.get(end)) is not None), None)
    return found or image_files.get_or_problem(name, "image")
