"""Localized Narratives (Pont-Tuset et al. 2020): captions spoken while the picture was described.

Its JSONL has a line a narrative: dataset_id, image_id, annotator_id, caption, timed_caption, traces, voice_recording. A
picture may have several narratives; they share its row in the store. Pictures are found by image id: Open Images and
Flickr30k name their files so, COCO pads the id to twelve digits.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.prepare.importers.common import Files, files_of, guarded, read_json_lines, read_rows, sample, write_import
from opt_ds.prepare.manifest import ManifestLine, Skipped

_SPLITS = {"train": "train", "validation": "valid", "val": "valid", "val2017": "valid", "train2017": "train", "test": "test"}
_LEAST_CONFIDENCE = 0.5  # of an image-level label: 1 is verified, 0 is verified as absent


def import_localized_narratives(
    annotations: Sequence[Path],
    output: Path,
    *,
    images: Path,
    recordings: Path | None = None,
    labels: Sequence[Path] = (),
    label_names: Path | None = None,
    keep_incomplete: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the manifest `output`. `recordings`: the folder that `voice_recording` is relative to.

    `labels`: Open Images' image-level label CSV files (ImageID, Source, LabelName, Confidence); `label_names`: its
    class descriptions (LabelName, DisplayName). The split follows from dataset_id.
    """
    pictures = Files(images, output, "image")
    sounds = files_of(recordings, output, "audio")
    labels_of = read_image_labels(labels, label_names, _image_ids(annotations)) if labels else {}
    entries = _entries(annotations, pictures, sounds, labels_of, keep_incomplete)
    return write_import(output, entries, say, source=", ".join(map(str, annotations)))


def _image_ids(annotations: Sequence[Path]) -> set[str]:
    entries = (entry for path in annotations for _, entry in read_json_lines(path))
    return {str(entry.get("image_id")) for entry in entries if isinstance(entry, dict)}


def _entries(
    annotations: Sequence[Path],
    pictures: Files,
    sounds: Files | None,
    labels_of: dict[str, tuple[str, ...]],
    keep_incomplete: bool,
) -> Iterator[ManifestLine | Skipped]:
    seen: Counter[str] = Counter()

    def narrative(entry: dict[str, Any]) -> ManifestLine | Skipped:
        dataset, image_id = str(entry["dataset_id"]), str(entry["image_id"])
        id = f"{dataset}/{image_id}/{entry['annotator_id']}"
        seen[id] += 1
        recording = entry.get("voice_recording")
        return sample(
            id if seen[id] == 1 else f"{id}/{seen[id]}",
            text=entry["caption"],
            files={
                "image": (image_id, _picture(pictures, image_id)),
                "audio": (str(recording), sounds.get(recording) if recording else None) if sounds else None,
            },
            labels=labels_of.get(image_id, ()),
            group=f"{dataset}/{image_id}",
            split=_SPLITS.get(dataset.rsplit("_", 1)[-1], "train"),
            keep_incomplete=keep_incomplete,
        )

    for path in annotations:
        for number, entry in read_json_lines(path):
            if isinstance(entry, Skipped):
                yield entry
            else:
                yield from guarded(f"{path.name} line {number}", lambda entry=entry: [narrative(entry)])  # type: ignore[misc]


def _picture(pictures: Files, image_id: str) -> str | None:
    return pictures.get(f"{image_id}.jpg") or pictures.by_stem(image_id) or pictures.by_stem(image_id.zfill(12))


def read_image_labels(
    files: Sequence[Path], names: Path | None, wanted: set[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return image id -> names of its verified or confident labels, from Open Images' image-level label CSV files.

    Only for the `wanted` images: the published files have tens of millions of rows.
    """
    name_of = {row[0]: row[1] for row in read_rows(names, ",") if len(row) > 1} if names is not None else {}
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for path in files:
        rows = read_rows(path, ",")
        header = next(rows, [])
        needed = ("ImageID", "LabelName", "Confidence")
        absent = [name for name in needed if name not in header]
        if absent:
            raise UserError(f"{path}: no column {absent[0]}: give Open Images' image-level labels (its first line: {header})")
        image, label, confidence = (header.index(name) for name in needed)
        for number, row in enumerate(rows, 2):
            if not any(row):
                continue
            try:
                if (wanted is None or row[image] in wanted) and float(row[confidence]) >= _LEAST_CONFIDENCE:
                    found[row[image]].setdefault(name_of.get(row[label], row[label]))
            except (IndexError, ValueError):
                raise UserError(f"{path} row {number}: not image, label and confidence: {row}"[:300]) from None
    return {image: tuple(labels) for image, labels in found.items()}
