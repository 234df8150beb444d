"""What the importers share: finding files, reading annotations, and writing a manifest with a report of what was left out.

An importer is a generator of `ManifestLine` (a sample) and `Skipped` (what is none, and why); `write_import` does the rest.
"""

import csv
import gzip
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from opt_ds.errors import UserError
from opt_ds.prepare.manifest import ManifestLine, Skipped, is_encodable, visible, write_manifest
from opt_ds.store.files import write_json

_SHOWN = 10
_JSON_BLOCK = 1 << 20
_BESIDE = (".json", ".txt", ".xml")  # what downloaders and annotators write beside a picture, under its name


class Files:
    """The files of a folder (pictures or recordings), found by relative path or by name without its ending."""

    def __init__(self, folder: Path, manifest: Path, kind: str) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder: it must hold the {kind} files")
        self.folder, self.kind = folder, kind
        self._start = manifest.parent.resolve()

    def get(self, name: str) -> str | None:
        """Return `folder/name` relative to the manifest; None if there is no such file."""
        path = self.folder / name
        try:
            return self._relative(path) if path.is_file() else None
        except OSError:  # a name longer than any file's
            return None

    def by_stem(self, stem: str) -> str | None:
        """Return the file called `stem`, in any folder below and with any ending but a text's; None if there is none."""
        path = self._stems.get(stem)
        return None if path is None else self._relative(Path(path))

    @cached_property
    def _stems(self) -> dict[str, str]:
        # Of two files with one name the first in the order of their paths counts, on every machine.
        found: dict[str, str] = {}
        for folder, folders, names in os.walk(self.folder):
            folders.sort()
            for name in sorted(names):
                stem, ending = os.path.splitext(name)
                if ending.lower() not in _BESIDE:
                    found.setdefault(stem, os.path.join(folder, name))
        return found

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path.parent.resolve() / path.name, self._start)


def files_of(folder: Path | None, manifest: Path, kind: str) -> Files | None:
    """Return the `Files` of a folder that was given."""
    return None if folder is None else Files(folder, manifest, kind)


def write_import(
    output: Path, entries: Iterable[ManifestLine | Skipped], say: Callable[[str], None], *, source: str
) -> Path:
    """Write the manifest `output`, and beside it `<name>.report.json`: how many samples, what was left out and why.

    UserError, and nothing written, if there is no sample at all or an id repeats.
    """
    skipped: list[Skipped] = []
    ids: set[str] = set()

    def samples() -> Iterator[ManifestLine]:
        for entry in entries:
            if isinstance(entry, Skipped):
                skipped.append(entry)
                continue
            if entry.id in ids:
                skipped.append(Skipped(entry.id, "the id is repeated"))
                continue
            ids.add(entry.id)
            yield entry
        if not ids:
            first = f'; "{skipped[0].id}": {skipped[0].reason}' if skipped else ""
            raise UserError(" ".join(f"{source}: no sample could be taken{first}".split()))

    count = write_manifest(output, samples())
    reasons = Counter(entry.reason.split(":")[0] for entry in skipped)
    report = {
        "samples": count,
        "skipped": len(skipped),
        "reasons": dict(reasons.most_common()),
        "skipped_samples": [{"id": entry.id, "reason": entry.reason} for entry in skipped],
    }
    write_json(report_path(output), report)
    say(f"{output}: {count} samples, {len(skipped)} left out")
    for reason, number in reasons.most_common():
        say(f"  {reason}: {number}")
    for entry in skipped[:_SHOWN]:
        say(f'  left out "{visible(entry.id)}": {visible(entry.reason)}')
    if len(skipped) > _SHOWN:
        say(f"  and {len(skipped) - _SHOWN} more in {report_path(output).name}")
    return output


def guarded(place: str, make: Callable[[], Iterable[ManifestLine | Skipped]]) -> Iterator[ManifestLine | Skipped]:
    """Yield what `make` gives of one entry of the annotations; an entry that is not as published is skipped as a whole."""
    try:
        yield from list(make())
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        yield Skipped(place, f"not as published: {place}: {type(error).__name__} {' '.join(str(error).split())[:100]}")


def report_path(manifest: Path) -> Path:
    """Where the report of an import lies."""
    return manifest.with_name(f"{manifest.stem}.report.json")


def sample(
    id: str,
    *,
    files: dict[str, tuple[str, str | None] | None],
    text: str | None = None,
    labels: tuple[str, ...] = (),
    group: str | None = None,
    split: str | None = None,
    keep_incomplete: bool = False,
) -> ManifestLine | Skipped:
    """Make a sample. `files`: "image" and "audio" -> (name in the annotations, where it was found), None if not wanted.

    A file that was not found leaves the sample out; with `keep_incomplete` only the file.
    """
    if text is not None and not isinstance(text, str):
        raise TypeError(f"the text is {type(text).__name__}")
    found: dict[str, str] = {}
    for kind, wanted in files.items():
        if wanted is None:
            continue
        name, path = wanted
        if path is not None:
            found[kind] = path
        elif not keep_incomplete:
            return Skipped(id, f"{kind} file is missing: {name}")
    id = id.encode("utf-8", "replace").decode()
    if text is not None and not text.strip():
        return Skipped(id, "the text is empty")
    if not found and text is None:
        return Skipped(id, "nothing is left of the sample")
    if not all(map(is_encodable, (text or "", group or "", split or "", *found.values(), *labels))):
        return Skipped(id, "half of a surrogate pair in it is no text")
    return ManifestLine(id=id, text=text, labels=labels, group=group, split=split, **found)  # type: ignore[arg-type]


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file, gzipped or not, and close it. UserError if it is missing, cut off, or something else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not UTF-8 text, or cut off ({error})") from None


def read_rows(path: Path, delimiter: str) -> Iterator[list[str]]:
    """Yield the rows of a CSV or TSV file. Tabs separate without quoting, as the published TSV files have it."""
    csv.field_size_limit(sys.maxsize)
    with open_text(path) as file:
        try:
            lines = (line.replace("\0", "") for line in file)
            if delimiter == "\t":
                yield from csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
            else:
                yield from csv.reader(lines, delimiter=delimiter)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not readable as a table ({error})") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of a JSONL file; the value is a Skipped for a line that is no JSON object."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                value = Skipped(f"line {number}", f"not JSON: {path.name} line {number} ({error})")
            yield number, value if isinstance(value, dict | Skipped) else Skipped(f"line {number}", "not a JSON object")


def read_json_array(path: Path) -> Iterator[Any]:
    """Yield the elements of a file that is one JSON array, without holding all of it (Visual Genome's are large)."""
    decoder, buffer, ended = json.JSONDecoder(), "", False
    with open_text(path) as file:
        buffer = file.read(_JSON_BLOCK).lstrip()
        if not buffer.startswith("["):
            raise UserError(f"{path}: not a JSON array")
        buffer = buffer[1:]
        while True:
            buffer = buffer.lstrip().removeprefix(",").lstrip()
            if buffer.startswith("]"):
                return
            try:
                value, end = decoder.raw_decode(buffer)
                if end == len(buffer) and not ended:  # a number could go on in the next block
                    raise ValueError
            except ValueError as error:
                if ended:
                    raise UserError(f"{path}: not JSON, or cut off ({error})") from None
                block = file.read(_JSON_BLOCK)
                ended = not block
                buffer += block
                continue
            yield value
            buffer = buffer[end:]


def read_json(path: Path) -> Any:
    """Read one JSON document. UserError if it is missing or none."""
    with open_text(path) as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error})") from None


def split_and_file(argument: str) -> tuple[str | None, Path]:
    """ "valid=captions.tsv" -> ("valid", path); without a split's name, (None, path)."""
    name, equals, path = argument.partition("=")
    return (name, Path(path)) if equals and "/" not in name else (None, Path(argument))
