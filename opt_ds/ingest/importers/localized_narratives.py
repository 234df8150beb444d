"""Localized Narratives (Pont-Tuset et al. 2020): spoken descriptions of images and their transcripts.

The JSONL file has one line per narrative: dataset_id, image_id, annotator_id, caption, timed_caption, traces,
voice_recording. An image may have several narratives, which share its row in the store. Images are found by their id.
Open Images and Flickr30k use the id as the file name; COCO pads it to twelve digits.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.former_names import former_arguments
from opt_ds.ingest.importers.common import (
    Entry,
    Unused,
    files_of,
    guarded,
    json_lines,
    sample,
    split_of_name,
    typed,
    unused_files,
    write_import,
)
from opt_ds.ingest.importers.files import Files, Found, Problem
from opt_ds.ingest.importers.tables import BadRow, Table, check_doubled, read_rows, read_table
from opt_ds.ingest.manifest import Skipped

_LEAST_CONFIDENCE = 0.5  # for an image-level label; 1 is verified as present, 0 as absent
_LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")


@dataclass
class ImageLabels:
    """Image id -> names of its labels, and the parts of the label files that were not used."""

    of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unused: list[Unused] = field(default_factory=list)


@former_arguments(recordings="audio")
def import_localized_narratives(
    annotations: Sequence[Path],
    output: Path,
    *,
    images: Path,
    audio: Path | None = None,
    labels: Sequence[Path] = (),
    label_names: Path | None = None,
    keep_incomplete: bool = False,
) -> Path:
    """Write the manifest `output`. The split is inferred from dataset_id.

    Args:
        annotations: JSONL files.
        output: The manifest to write.
        images: The folder of the images.
        audio: The folder that `voice_recording` is relative to. None: no audio.
        labels: Open Images' image-level label CSV files (ImageID, Source, LabelName, Confidence).
        label_names: Open Images' class descriptions (LabelName, DisplayName).
        keep_incomplete: Keep samples with missing files.
    """
    image_files = Files(images, output, "image")
    audio_files = files_of(audio, output, "audio")
    labels_of = read_image_labels(labels, label_names, _image_ids(annotations)) if labels else ImageLabels()

    def entries() -> Iterator[Entry]:
        yield from _entries(annotations, image_files, audio_files, labels_of.of, keep_incomplete)
        yield from labels_of.unused
        yield from unused_files([image_files, audio_files])

    return write_import(output, entries(), source=", ".join(map(str, annotations)))


def _image_ids(annotations: Sequence[Path]) -> set[str]:
    entries = (entry for path in annotations for _, entry in json_lines(path))
    return {str(entry.get("image_id")) for entry in entries if isinstance(entry, dict)}


def _entries(
    annotations: Sequence[Path],
    image_files: Files,
    audio_files: Files | None,
    labels_of: dict[str, tuple[str, ...]],
    keep_incomplete: bool,
) -> Iterator[Entry]:
    seen: Counter[str] = Counter()

    def narrative(entry: dict[str, Any]) -> Entry:
        dataset = typed(entry["dataset_id"], str, "dataset_id")
        image_id = str(typed(entry["image_id"], (str, int), "image_id"))
        annotator = typed(entry["annotator_id"], (int, str), "annotator_id")
        id = f"{dataset}/{image_id}/{annotator}"
        seen[id] += 1
        audio_name = entry.get("voice_recording")
        if audio_name is not None:
            typed(audio_name, str, "voice_recording")
        if audio_name is not None and _is_of_another_image(audio_name, dataset, image_id):
            return Skipped(id, f"it contradicts itself: its audio is {audio_name}")
        return sample(
            id if seen[id] == 1 else f"{id}/{seen[id]}",
            text=typed(entry["caption"], str, "caption"),
            files={
                "image": (image_id, _image(image_files, image_id)),
                "audio": (str(audio_name), audio_files.get(audio_name) if audio_name else None)
                if audio_files
                else None,
            },
            labels=labels_of.get(image_id, ()),
            group=f"{dataset}/{image_id}",
            split=split_of_name(dataset.rsplit("_", 1)[-1]),
            keep_incomplete=keep_incomplete,
        )

    for path in annotations:
        for number, entry in json_lines(path):
            if isinstance(entry, Skipped):
                yield entry
            else:
                yield from guarded(f"{path.name} line {number}", lambda entry=entry: [narrative(entry)])  # type: ignore[misc]


def _is_of_another_image(audio_name: str, dataset: str, image_id: str) -> bool:
    """Return whether a published file name, DATASET_IMAGE_ANNOTATOR, belongs to another image."""
    name = Path(audio_name).stem
    is_published = name.startswith(f"{dataset}_") and name.count("_") >= dataset.count("_") + 2
    return is_published and not name.startswith(f"{dataset}_{image_id}_")


def _image(image_files: Files, image_id: str) -> Found:
    """Return the image named by the id, or by the id padded to twelve digits as in COCO.

    Return a Problem if both exist.
    """
    own = image_files.get(f"{image_id}.jpg") or image_files.by_stem(image_id)
    padded = image_id.zfill(12)
    if padded == image_id or not image_id.isdigit():
        return own
    other = image_files.by_stem(padded)
    if own is not None and other is not None:
        return Problem(f"several image files have its name: {image_id} and {padded}: keep one in {image_files.folder}")
    return own or other


def read_image_labels(files: Sequence[Path], names: Path | None, wanted: set[str] | None = None) -> ImageLabels:
    """Return the verified or confident labels of each image, from Open Images' image-level label CSV files.

    Only labels of the `wanted` images are kept, as the published files have tens of millions of rows. Invalid rows are
    counted.
    """
    result = ImageLabels()
    name_of = _label_names(names, result) if names is not None else {}
    found: dict[str, dict[str, None]] = defaultdict(dict)
    nameless: set[str] = set()
    for path in files:
        table = read_table(path, _LABEL_COLUMNS)
        bad: list[str] = []
        for image, label, confidence in _label_rows(path, table, bad):
            if (wanted is not None and image not in wanted) or not confidence >= _LEAST_CONFIDENCE:
                continue
            if names is not None and label not in name_of:
                nameless.add(label)
            found[image].setdefault(name_of.get(label, label))
        if bad:
            why = f"of {path.name}, not image, label and confidence"
            result.unused.append(Unused("rows", len(bad), tuple(bad[:100]), why))
    if nameless:
        why = f"not in {names}: such labels keep their code"
        result.unused.append(Unused("label codes without a name", len(nameless), tuple(sorted(nameless)[:100]), why))
    result.of = {image: tuple(labels) for image, labels in found.items()}
    return result


def _label_rows(path: Path, table: Table, bad: list[str]) -> Iterator[tuple[str, str, float]]:
    """Yield (image, label, confidence). Append rows of another form to `bad`."""
    absent = [name for name in _LABEL_COLUMNS if name not in table.columns]
    if absent:
        header = ", ".join(table.columns)
        raise UserError(f"{path}: no column {absent[0]}: give Open Images' image-level labels (its columns: {header})")
    check_doubled(path, table.columns, _LABEL_COLUMNS)
    image, label, confidence = (table.columns.index(name) for name in _LABEL_COLUMNS)
    for row in table.rows:
        try:
            if isinstance(row, BadRow):
                raise ValueError
            yield row.cells[image], row.cells[label], float(row.cells[confidence])
        except ValueError:
            bad.append(f"line {row.line}")


def _label_names(path: Path, result: ImageLabels) -> dict[str, str]:
    """Return code -> name. The published file has no header. A code with two names keeps the first."""
    found: dict[str, str] = {}
    bad = []
    for row in read_rows(path, ",", quoted=True):
        if len(row.cells) != 2 or found.setdefault(row.cells[0], row.cells[1]) != row.cells[1]:
            bad.append(f"line {row.line}")
    if bad:
        why = f"of {path.name}, not a code and its one name"
        result.unused.append(Unused("rows", len(bad), tuple(bad[:100]), why))
    return found
