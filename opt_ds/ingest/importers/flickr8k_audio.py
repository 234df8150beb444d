"""Flickr8k Audio Captions (Harwath & Glass 2015): five spoken captions of each image of Flickr8k.

A line of wav2capt.txt has an audio file, an image and the number of its caption: `a_0.wav a.jpg #0`. The texts are those of
Flickr8k: Flickr8k.token.txt, with lines of `a.jpg#0`, tab, caption, or Karpathy's dataset_flickr8k.json, which has splits
too. wav2spk.txt names the speakers, which a manifest does not hold.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import (
    Entry,
    Unused,
    guarded,
    sample,
    split_and_file,
    split_of_name,
    unused_files,
    write_import,
)
from opt_ds.ingest.importers.files import Files
from opt_ds.ingest.importers.tables import read_rows
from opt_ds.ingest.manifest import Skipped
from opt_ds.ingest.text_files import open_text, read_json

_LINE = re.compile(r"(\S+)\s+(\S+)\s+#(\d+)")
_TOKEN = re.compile(r"(.+)#(\d+)")


@dataclass
class _Texts:
    """(image, number) -> caption, and image -> split."""

    captions: dict[tuple[str, int], str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)


def import_flickr8k_audio(
    annotations: Path,
    output: Path,
    *,
    images: Path,
    audio: Path,
    captions: Path | None = None,
    splits: Sequence[str] = (),
    keep_incomplete: bool = False,
) -> Path:
    """Write the manifest `output`. The id of a sample is the name of its audio file.

    Args:
        annotations: wav2capt.txt.
        output: The manifest to write.
        images: The folder of Flickr8k's images.
        audio: The folder of the audio files (wavs).
        captions: Flickr8k.token.txt or dataset_flickr8k.json. None: no texts.
        splits: SPLIT=FILE of lists of images, such as train=Flickr_8k.trainImages.txt. Other images are left out.
        keep_incomplete: Keep samples whose image or audio file is missing, without it.

    Raises:
        UserError: A file is missing or has another form, or an image is in two splits.
    """
    texts = _Texts() if captions is None else _of_json(captions) if _is_json(captions) else _of_tokens(captions)
    if splits:
        texts.splits = _splits(splits)
    image_files, audio_files = Files(images, output, "image"), Files(audio, output, "audio")
    used: set[tuple[str, int]] = set()

    def entry(place: str, line: str) -> Iterator[Entry]:
        match = _LINE.fullmatch(line)
        if match is None:
            yield Skipped(place, f"not an audio file, an image and #number: {place}")
            return
        wav, image, key = match[1], match[2], (match[2], int(match[3]))
        if captions is not None and key not in texts.captions:
            yield Skipped(wav, f"its caption is not in {captions.name}: {image}#{key[1]}")
            return
        if texts.splits and image not in texts.splits:
            yield Skipped(wav, f"its image is in no split: {image}")
            return
        used.add(key)
        yield sample(
            wav,
            text=texts.captions.get(key),
            files={
                "image": (image, image_files.get_or_problem(image, "image")),
                "audio": (wav, audio_files.get_or_problem(wav, "audio")),
            },
            group=f"image {image}",
            split=texts.splits.get(image),
            keep_incomplete=keep_incomplete,
        )

    def entries() -> Iterator[Entry]:
        with open_text(annotations) as file:
            for number, line in enumerate(file, 1):
                place = f"{annotations.name} line {number}"
                if line.strip():
                    yield from guarded(place, partial(entry, place, line.strip()))
        left = [f"{image}#{number}" for image, number in texts.captions if (image, number) not in used]
        if left and captions is not None:
            yield Unused("captions", len(left), tuple(left), f"of {captions.name}, they have no audio file that is used")
        yield from unused_files([image_files, audio_files])

    return write_import(output, entries(), source=str(annotations))


def _is_json(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(".json")


def _of_tokens(path: Path) -> _Texts:
    texts = _Texts()
    for row in read_rows(path, "\t", quoted=False):
        match = _TOKEN.fullmatch(row.cells[0]) if len(row.cells) == 2 else None
        if match is None:
            raise UserError(f"{path} line {row.line}: not name#number, tab and caption: give Flickr8k.token.txt")
        texts.captions[match[1], int(match[2])] = row.cells[1].strip()
    return texts


def _of_json(path: Path) -> _Texts:
    content: Any = read_json(path)
    texts = _Texts()
    try:
        for image in content["images"]:
            texts.splits[image["filename"]] = split_of_name(image["split"]) or image["split"]
            for number, sentence in enumerate(image["sentences"]):
                texts.captions[image["filename"], number] = sentence["raw"].strip()
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not Karpathy's dataset_flickr8k.json: its images have filename, split and sentences") from None
    return texts


def _splits(lists: Sequence[str]) -> dict[str, str]:
    """Return image -> split."""
    found: dict[str, str] = {}
    for each in lists:
        split, path = split_and_file(each)
        if split is None:
            raise UserError(f'--split "{each}": write SPLIT=FILE, such as train=Flickr_8k.trainImages.txt')
        with open_text(path) as file:
            for name in filter(None, map(str.strip, file)):
                if found.setdefault(name, split) != split:
                    raise UserError(f"{path}: {name} is in split {found[name]} too: list it once")
    return found
