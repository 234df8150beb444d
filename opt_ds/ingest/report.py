"""The report of preparation: report.json and a table for the terminal. Its bytes are reproducible.

The notes of a shard are kept in its journal until the store is complete. Their fields are `skipped` [{id, reason}],
`files` {name of a file that was not used: [bytes, hash] or null} (see retry.py), `truncated` {text, audio: [id]}, and
`digests` {modality: [[hash of the content, split, id of the first sample that uses it], … by row]}.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.former_names import PREPARATION, current_fields
from opt_ds.ingest.manifest import visible
from opt_ds.store.files import atomic_file, write_json
from opt_ds.store.lengths import LENGTHS_FILE, UNITS, draw_lengths, length_summary, shard_lengths
from opt_ds.store.schema import StoreDescription

REPORT_FILE = "report.json"
_SHOWN = 10


def build_report(
    num_lines: int, rejected: Sequence[dict[str, str]], notes: Iterable[dict[str, Any]], lengths: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
        num_lines: Number of valid manifest lines.
        rejected: Id and reason of manifest lines that are not samples.
        notes: The notes of all shards in order. They are iterated once.
        lengths: Lengths of all rows of each modality, see store/lengths.py.
    """
    skipped = list(rejected)
    files: dict[str, Any] = {}
    truncated: dict[str, list[str]] = {"text": [], "audio": []}
    duplicates = {kind: _Duplicates() for kind in lengths}
    for note in notes:
        note = current_fields(note, PREPARATION)
        skipped += note["skipped"]
        files |= note.get("files", {})
        for kind, ids in note["truncated"].items():
            truncated[kind] += ids
        for kind, rows in note["digests"].items():
            for digest, split, id in rows:
                duplicates[kind].add(digest, split, id)
    return {
        "kept": num_lines + len(rejected) - len(skipped),
        "skipped": len(skipped),
        "reasons": dict(Counter(entry["reason"].split(":")[0] for entry in skipped).most_common()),
        "skipped_samples": skipped,
        **({"skipped_files": files} if files else {}),
        "truncated": truncated,
        "duplicates": {kind: found.summary() for kind, found in duplicates.items()},
        "lengths": {kind: length_summary(values) for kind, values in lengths.items()},
    }


@dataclass
class ModalityNotes:
    """The report of an update of one modality.

    `digests` are as in the notes of a shard, `truncated` are truncated samples.
    """

    kind: str
    dropped: list[dict[str, str]] = field(default_factory=list)  # id and reason of samples left without this modality
    truncated: list[str] = field(default_factory=list)
    digests: list[tuple[str, str, str]] = field(default_factory=list)

    def shown(self) -> list[str]:
        """Return one line per sample in `dropped` for the first few, and how many more there are."""
        lines = [f'  "{visible(entry["id"])}": {visible(entry["reason"])}' for entry in self.dropped[:_SHOWN]]
        more = len(self.dropped) - _SHOWN
        return [*lines, f"  and {more} more in {REPORT_FILE}"] if more > 0 else lines


def refresh_report(path: Path, description: StoreDescription, notes: ModalityNotes) -> None:
    """Update report.json and lengths.png of the store `path` after an update of one modality.

    `truncated`, `duplicates` and the lengths are replaced. `dropped` names the samples that are left without the
    modality. Samples skipped when the store was made stay listed. A store without a report gets lengths.png only.
    """
    lengths = shard_lengths([path / shard.file for shard in description.shards], description.modalities)
    with atomic_file(path / LENGTHS_FILE) as temporary:
        draw_lengths(lengths, temporary, description.units)
    if not (path / REPORT_FILE).is_file():
        return
    report = current_fields(json.loads((path / REPORT_FILE).read_text(encoding="utf-8")), PREPARATION)
    duplicates = _Duplicates()
    for digest, split, id in notes.digests:
        duplicates.add(digest, split, id)
    if notes.kind in report["truncated"]:
        report["truncated"][notes.kind] = notes.truncated
    report["duplicates"][notes.kind] = duplicates.summary()
    report["dropped"] = {**report.get("dropped", {}), notes.kind: notes.dropped}
    report["lengths"] = {kind: length_summary(values) for kind, values in lengths.items()}
    write_json(path / REPORT_FILE, report)


def report_table(report: dict[str, Any], limits: dict[str, int | None], units: Mapping[str, str] = UNITS) -> list[str]:
    """Return the report as lines of a table, followed by the first few skipped samples.

    `units` is the plural word for the items of each modality.
    """
    rows = [("samples kept", str(report["kept"])), ("samples skipped", str(report["skipped"]))]
    rows += [(f"  {reason}", str(count)) for reason, count in report["reasons"].items()]
    for kind, limit in (("text", limits["max_tokens"]), ("audio", limits["max_frames"])):
        if report["truncated"][kind]:
            rows.append((f"{kind} truncated at {limit} {units[kind]}", str(len(report["truncated"][kind]))))
    for kind, found in report["duplicates"].items():
        if found["repeated"]:
            across = f", {found['across_splits']} of them in several splits" if found["across_splits"] else ""
            rows.append((f"{kind} rows equal to another", f"{found['repeated']}{across}"))
    for kind, summary in report["lengths"].items():
        if summary["rows"]:
            numbers = " / ".join(f"{summary[name]:g}" for name in ("min", "median", "p95", "max"))
            rows.append((f"{units[kind]} a row, min / median / 95 % / max", numbers))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    for entry in report["skipped_samples"][:_SHOWN]:
        lines.append(f'  skipped "{visible(entry["id"])}": {visible(entry["reason"])}')
    more = report["skipped"] - _SHOWN
    return [*lines, f"  and {more} more in {REPORT_FILE}"] if more > 0 else lines


class _Duplicates:
    """Counts rows with equal content. Ids are kept only for contents that repeat."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, str]] = {}  # digest -> split and id
        self._repeated: dict[str, tuple[list[str], set[str]]] = {}  # digest -> all ids and splits

    def add(self, digest: str, split: str, id: str) -> None:
        """Add one row."""
        first = self._first.setdefault(digest, (split, id))
        if first[1] == id:
            return
        ids, splits = self._repeated.setdefault(digest, ([first[1]], {first[0]}))
        ids.append(id)
        splits.add(split)

    def summary(self) -> dict[str, Any]:
        """Return the number of repeated rows, of contents in several splits, and the largest sets of ids."""
        largest = sorted(self._repeated.values(), key=lambda found: len(found[0]), reverse=True)[:_SHOWN]
        return {
            "repeated": sum(len(ids) - 1 for ids, _ in self._repeated.values()),
            "across_splits": sum(len(splits) > 1 for _, splits in self._repeated.values()),
            "largest": [ids[:_SHOWN] for ids, _ in largest],
        }
