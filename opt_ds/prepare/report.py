"""What preparation reports: report.json and a table for people. The same bytes every time.

A shard's notes (kept in its journal until the store is whole): `skipped` [{id, reason}], `cut` {text, audio: [id]},
`digests` {text, image, audio: [[hash of the content, split, id of the first sample that uses it], … by row]}.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from opt_ds.store.lengths import UNITS, length_summary
from opt_ds.store.schema import MODALITIES

REPORT_FILE = "report.json"
_SHOWN = 10


def build_report(
    num_lines: int, rejected: Sequence[dict[str, str]], notes: Sequence[dict[str, Any]], lengths: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Return report.json's content. `rejected`: manifest lines that are no samples; `lengths`: see store/lengths.py."""
    skipped = [*rejected, *(entry for note in notes for entry in note["skipped"])]
    return {
        "kept": num_lines + len(rejected) - len(skipped),
        "skipped": len(skipped),
        "reasons": dict(Counter(entry["reason"].split(":")[0] for entry in skipped).most_common()),
        "skipped_samples": skipped,
        "cut": {kind: [id for note in notes for id in note["cut"][kind]] for kind in ("text", "audio")},
        "duplicates": {
            kind: _duplicates([row for note in notes for row in note["digests"][kind]]) for kind in MODALITIES
        },
        "lengths": {kind: length_summary(lengths[kind]) for kind in MODALITIES},
    }


def report_table(report: dict[str, Any], limits: dict[str, int | None]) -> list[str]:
    """Return the report as lines of a table, the first few skipped samples by name."""
    rows = [("samples kept", str(report["kept"])), ("samples skipped", str(report["skipped"]))]
    rows += [(f"  {reason}", str(count)) for reason, count in report["reasons"].items()]
    for kind, limit in (("text", limits["max_tokens"]), ("audio", limits["max_frames"])):
        if report["cut"][kind]:
            rows.append((f"{kind} cut at {limit} {UNITS[kind]}", str(len(report["cut"][kind]))))
    for kind, found in report["duplicates"].items():
        if found["repeated"]:
            across = f", {found['across_splits']} of them in several splits" if found["across_splits"] else ""
            rows.append((f"{kind} rows equal to another", f"{found['repeated']}{across}"))
    for kind, summary in report["lengths"].items():
        if summary["rows"]:
            numbers = " / ".join(f"{summary[name]:g}" for name in ("min", "median", "p95", "max"))
            rows.append((f"{UNITS[kind]} a row, min / median / 95 % / max", numbers))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    for entry in report["skipped_samples"][:_SHOWN]:
        lines.append(f'  skipped "{_visible(entry["id"])}": {_visible(entry["reason"])}')
    more = report["skipped"] - _SHOWN
    return [*lines, f"  and {more} more in {REPORT_FILE}"] if more > 0 else lines


def _duplicates(rows: list[list[str]]) -> dict[str, Any]:
    ids, splits = defaultdict(list), defaultdict(set)
    for digest, split, id in rows:
        ids[digest].append(id)
        splits[digest].add(split)
    repeated = {digest: names for digest, names in ids.items() if len(names) > 1}
    largest = sorted(repeated.values(), key=len, reverse=True)[:_SHOWN]
    return {
        "repeated": sum(len(names) - 1 for names in repeated.values()),
        "across_splits": sum(len(splits[digest]) > 1 for digest in repeated),
        "largest": [names[:_SHOWN] for names in largest],
    }


def _visible(text: str) -> str:
    # A control or direction character in an id must not repaint the terminal.
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)
