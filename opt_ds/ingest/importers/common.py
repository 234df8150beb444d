"""Shared parts of the importers: samples, skipped and unused entries, and writing a manifest with a report.

An importer is a generator of `ManifestLine` (a sample), `Skipped` (an entry that is not used, with the reason),
`Unused` (something that is not a sample) and `Note` (an assumption or a finding). `write_import` does the rest.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.importers.files import Files, Found, Problem
from opt_ds.ingest.manifest import ManifestLine, Skipped, is_encodable, visible, write_manifest
from opt_ds.ingest.text_files import read_json_lines
from opt_ds.store.files import write_json

_LOG = logging.getLogger(__name__)
_SHOWN = 10
_NAMED = 5
_MOST_NAMES = 1000
_SPLIT_OF_WORD = {
    "train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid",
    "test": "test", "testing": "test",
}  # fmt: skip
_SPLIT_NAME = re.compile(r"([a-z]+)([-_ ]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Unused:
    """Things that an import did not use and that are not samples.

    There are `count` of `what` ("files"), with some names and the reason.
    """

    what: str
    count: int
    names: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Note:
    """An assumption or a finding of an import, for the user to check."""

    text: str


Entry = ManifestLine | Skipped | Unused | Note


@dataclass
class _Report:
    """Collects the outcome of all entries."""

    splits: Counter[bool] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)
    unused: list[Unused] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_import(output: Path, entries: Iterable[Entry], *, source: str) -> Path:
    """Write the manifest `output`, and `<name>.report.json` next to it.

    The report has the number of samples, and what was skipped and why. Raise UserError, and write nothing, if there are
    no samples, or if only some samples have a split.
    """
    report = _Report()
    count = write_manifest(output, _samples(entries, report, source))
    reasons = Counter(entry.reason.split(":")[0] for entry in report.skipped)
    content = {
        "samples": count,
        "skipped": len(report.skipped),
        "reasons": dict(reasons.most_common()),
        "skipped_samples": [{"id": entry.id, "reason": entry.reason} for entry in report.skipped],
        "unused": [
            {"what": each.what, "count": each.count, "why": each.why, "names": list(each.names)}
            for each in report.unused
        ],
        "notes": report.notes,
    }
    write_json(report_path(output), content)
    _LOG.info(f"{output}: {count} samples, {len(report.skipped)} left out")
    for reason, number in reasons.most_common():
        _LOG.info(f"  {reason}: {number}")
    for entry in report.skipped[:_SHOWN]:
        _LOG.info(f'  left out "{visible(entry.id)}": {visible(entry.reason)}')
    if len(report.skipped) > _SHOWN:
        _LOG.info(f"  and {len(report.skipped) - _SHOWN} more in {report_path(output).name}")
    for each in report.unused:
        _LOG.info(f"  {unused_line(each)}")
    for note in report.notes:
        _LOG.info(f"  note: {visible(note)}")
    return output


def unused_line(unused: Unused) -> str:
    """Return a message such as "2 files were not used: README.txt, b.pdf (why)"."""
    names = ", ".join(map(visible, unused.names[:_NAMED]))
    more = ", …" if names and unused.count > len(unused.names[:_NAMED]) else ""
    what = unused.what.removesuffix("s") if unused.count == 1 else unused.what
    verb = "was" if unused.count == 1 else "were"
    why = f" ({unused.why})" if unused.why else ""
    return f"{unused.count} {what} {verb} not used{': ' if names else ''}{names}{more}{why}"


def unused_files(folders: Iterable[Files | None]) -> Iterator[Unused]:
    """Yield, per folder, the image and audio files that no entry of the annotations named."""
    for files in {id(each): each for each in folders if each is not None}.values():
        names = files.unused()
        if names:
            yield Unused("files", len(names), tuple(names), f"in {files.folder}, no entry names them")


def guarded(place: str, make: Callable[[], Iterable[Entry]]) -> Iterator[Entry]:
    """Yield what `make` yields for one entry of the annotations. Skip an entry that does not have the published form.

    Call it for the smallest unit. Entries yielded before the error are kept, and so are the other units.
    """
    try:
        yield from make()
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        yield Skipped(place, f"not as published: {place}: {_why(error)}")


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {str(error)[:100]}"
    return " ".join(str(error).split())[:100] or type(error).__name__


def typed(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    """Return the value if it has the type (a bool is not a number). Raise TypeError, naming the field, otherwise."""
    if not isinstance(value, kind) or isinstance(value, bool):
        words = {str: "a text", int: "a number", list: "a list"}
        wanted = kind[0] if isinstance(kind, tuple) else kind
        raise TypeError(f"{name} is not {words[wanted]}")
    return value


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | Skipped]]:
    """Yield (line number, object) of a JSONL file, with a Skipped for a line that is not a JSON object."""
    for number, value in read_json_lines(path):
        if isinstance(value, str):
            reason, colon, why = value.partition(":")
            yield number, Skipped(f"{path.name} line {number}", f"{reason}: {path.name} line {number}{colon}{why}")
        else:
            yield number, value


def report_path(manifest: Path) -> Path:
    """Return the path of the report of an import."""
    return manifest.with_name(f"{manifest.stem}.report.json")


def sample(
    id: str,
    *,
    files: dict[str, tuple[str, Found] | None],
    text: str | None = None,
    labels: tuple[str, ...] = (),
    group: str | None = None,
    split: str | None = None,
    keep_incomplete: bool = False,
) -> ManifestLine | Skipped:
    """Make a sample, or a Skipped if it cannot be used.

    Args:
        id: Id of the sample.
        files: "image" and "audio" -> (name in the annotations, where it was found); None if the modality is not wanted.
        text: The text.
        labels: The labels.
        group: The group.
        split: The split.
        keep_incomplete: Drop only a file that is missing or unusable. False: skip the sample.
    """
    if text is not None:
        typed(text, str, "the text")
    found: dict[str, str] = {}
    for kind, wanted in files.items():
        if wanted is None:
            continue
        name, path = wanted
        if isinstance(path, str):
            found[kind] = path
        elif not keep_incomplete:
            return Skipped(id, path.reason if isinstance(path, Problem) else f"{kind} file is missing: {name}")
    id = id.encode("utf-8", "replace").decode()
    if text is not None and not text.strip():
        return Skipped(id, "the text is empty")
    if not found and text is None:
        return Skipped(id, "nothing is left of the sample")
    if not all(map(is_encodable, (text or "", group or "", split or "", *found.values(), *labels))):
        return Skipped(id, "half of a surrogate pair in it is no text")
    return ManifestLine(id=id, text=text, labels=labels, group=group, split=split, **found)  # type: ignore[arg-type]


def files_of(folder: Path | None, manifest: Path, kind: str) -> Files | None:
    """Return the `Files` of a folder; None for None."""
    return None if folder is None else Files(folder, manifest, kind)


def split_of_name(name: str) -> str | None:
    """Return the split that a word means ("Validation", "val2017", "dev"); None for another word."""
    match = _SPLIT_NAME.fullmatch(name.strip())
    return _SPLIT_OF_WORD.get(match[1].lower()) if match else None


def split_of_file(path: Path) -> str | None:
    """Return the split that a word of a file's name means (captions_val2017.json); None if there is not exactly one."""
    words = re.split(r"[^a-z0-9]+", path.name.split(".")[0], flags=re.IGNORECASE)
    found = {split for word in words if (split := split_of_name(word)) is not None}
    return found.pop() if len(found) == 1 else None


def split_and_file(argument: str) -> tuple[str | None, Path]:
    """Parse "valid=captions.tsv" to ("valid", path). Without the name of a split return (None, path)."""
    name, equals, path = argument.partition("=")
    return (name, Path(path)) if equals and "/" not in name else (None, Path(argument))


def prefixes(annotations: Sequence[Path]) -> list[str]:
    """Return a prefix per file for its ids, so that ids of several files differ; "" for a single file.

    Raise UserError for a file that is given twice, and for two files with the same name.
    """
    if len(annotations) == 1:
        return [""]
    names = [path.name.split(".")[0] for path in annotations]
    doubled = next((place for place, name in enumerate(names) if name in names[:place]), None)
    if doubled is not None:
        first = annotations[names.index(names[doubled])]
        second = annotations[doubled]
        raise UserError(f"--annotations {first} and {second}: the same name: give each once, or rename one")
    return [f"{name}/" for name in names]


def _encodable(text: str) -> str:
    """Escape unpaired surrogates, which cannot be written to a file.

    Names of files that are not UTF-8 contain some too.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def _samples(entries: Iterable[Entry], report: _Report, source: str) -> Iterator[ManifestLine]:
    ids: set[str] = set()
    without = ""
    for entry in entries:
        if isinstance(entry, Unused):
            names = tuple(map(_encodable, entry.names[:_MOST_NAMES]))
            report.unused.append(Unused(entry.what, entry.count, names, _encodable(entry.why)))
        elif isinstance(entry, Note):
            report.notes.append(_encodable(entry.text))
        elif isinstance(entry, Skipped):
            report.skipped.append(Skipped(_encodable(entry.id), _encodable(entry.reason)))
        elif entry.id in ids:
            report.skipped.append(Skipped(entry.id, "the id is repeated"))
        else:
            ids.add(entry.id)
            report.splits[entry.split is not None] += 1
            without = without or (entry.id if entry.split is None else "")
            yield entry
    if not ids:
        first = f'; "{report.skipped[0].id}": {report.skipped[0].reason}' if report.skipped else ""
        raise UserError(" ".join(f"{source}: no sample could be taken{first}".split()))
    if len(report.splits) > 1:
        raise UserError(
            f'{source}: {report.splits[False]} of {len(ids)} samples name no split, such as "{visible(without)}", '
            "although others do: name it for all or for none"
        )
