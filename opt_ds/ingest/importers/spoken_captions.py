"""Spoken captions of images: SpokenCOCO (Hsu et al. 2021) and Places Audio Captions (Harwath et al. 2016, 2018).

Both are a JSON object with a list `data`. An entry of SpokenCOCO has an image and its `captions`, each with wav, text,
uttid and speaker; the variant by Karpathy's splits has one `caption` per entry. An entry of Places has image, wav,
asr_text, uttid and speaker. Each audio file is a sample. The audio files of an image share its row.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import (
    Entry,
    guarded,
    sample,
    split_and_file,
    split_of_file,
    typed,
    unused_files,
    write_import,
)
from opt_ds.ingest.importers.files import Files, Found
from opt_ds.ingest.text_files import read_json

_TEXTS = ("text", "asr_text")  # of SpokenCOCO, and of Places


class _Folders:
    """The folders of the images and audio files."""

    def __init__(self, images: Path, audio: Path, manifest: Path) -> None:
        self.images, self.audio = Files(images, manifest, "image"), Files(audio, manifest, "audio")

    def image(self, name: str) -> Found:
        """Return the image with this path, or with this name in another folder (COCO's are often all in one)."""
        return self.images.get(name) or self.images.get(Path(name).name) or self.images.by_stem(Path(name).stem)

    def audio_file(self, name: str) -> Found:
        """Return the audio file with this path, or with this name."""
        return self.audio.get(name) or self.audio.by_stem(Path(name).stem)


def import_spoken_captions(
    annotations: Sequence[str], output: Path, *, images: Path, audio: Path, keep_incomplete: bool = False
) -> Path:
    """Write the manifest `output`. The id of a sample is its uttid.

    Args:
        annotations: JSON files, each FILE or SPLIT=FILE. Without SPLIT, a split in the name of the file is used.
        output: The manifest to write.
        images: The folder that the paths of the images are relative to.
        audio: The folder that the paths of the audio files are relative to.
        keep_incomplete: Keep samples whose image or audio file is missing, without it.
    """
    folders = _Folders(images, audio, output)

    def entries() -> Iterator[Entry]:
        for split, path in map(split_and_file, annotations):
            for number, entry in enumerate(_data(path)):
                place = f"{path.name} entry {number}"
                make = partial(_of_image, place, entry, folders, split or split_of_file(path), keep_incomplete)
                yield from guarded(place, make)
        yield from unused_files([folders.images, folders.audio])

    return write_import(output, entries(), source=", ".join(annotations))


def _data(path: Path) -> list[Any]:
    content = read_json(path)
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list):
        raise UserError(f'{path}: no list "data": give the JSON of SpokenCOCO or of Places Audio Captions')
    return data


def _of_image(place: str, entry: dict[str, Any], folders: _Folders, split: str | None, keep_incomplete: bool) -> Iterator[Entry]:
    """Yield the samples of an entry: of its captions, of its only caption, or of the entry itself."""
    image = typed(entry["image"], str, "image")
    captions = entry["captions"] if "captions" in entry else [entry.get("caption", entry)]
    for number, caption in enumerate(typed(captions, list, "captions")):
        own = f"{place} caption {number}" if "captions" in entry else place
        yield from guarded(own, partial(_of_recording, image, caption, folders, split, keep_incomplete))


def _of_recording(
    image: str, caption: dict[str, Any], folders: _Folders, split: str | None, keep_incomplete: bool
) -> Iterator[Entry]:
    wav = typed(caption["wav"], str, "wav")
    text = next((caption[name] for name in _TEXTS if caption.get(name) is not None), None)
    yield sample(
        typed(caption["uttid"], str, "uttid"),
        text=text,
        files={"image": (image, folders.image(image)), "audio": (wav, folders.audio_file(wav))},
        group=f"image {image}",
        split=split,
        keep_incomplete=keep_incomplete,
    )
