"""Folders with a table of their files, as Hugging Face's ImageFolder and AudioFolder read them.

`metadata.jsonl`, `metadata.csv` or `metadata.parquet` has the column `file_name`, relative to its own folder, and any other
columns. It may be in the folder itself or in subfolders. Subfolders called train, validation and test are the splits.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opt_ds.decoding.file_kinds import is_clutter, kind_of_name
from opt_ds.errors import UserError
from opt_ds.ingest.importers.arrow_tables import open_table
from opt_ds.ingest.importers.common import json_lines, split_of_name
from opt_ds.ingest.importers.table import TableRow, TableSource, import_rows, parse_columns
from opt_ds.ingest.importers.tables import BadRow, check_doubled, read_table
from opt_ds.ingest.manifest import Skipped

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_FILE_NAME = "file_name"
_MEDIA = ("image", "audio")


@dataclass
class _Contents:
    """What the rows of all tables name: columns, kinds of files, and the split folders they are in."""

    columns: dict[str, None] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    splits: Counter[str | None] = field(default_factory=Counter)


def import_metadata_folder(folder: Path, output: Path, *, columns: Sequence[str] = ()) -> Path:
    """Write the manifest `output` for a folder with metadata.jsonl, metadata.csv or metadata.parquet.

    The id of a row without an id is the path of its file. See `import_table` for `columns`.

    Raises:
        UserError: There is no such table, or one has no column file_name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    column_of = parse_columns(columns)
    tables = _tables(folder)
    contents = _contents(folder, tables)
    shown = [kind for kind in _MEDIA if kind in contents.kinds]
    others = [column for column in contents.columns if column not in (*shown, *map(_name_column, ("", *_MEDIA)))]
    has_splits = len(contents.splits) > 1 and column_of["split"] not in contents.columns
    source = TableSource(str(folder), [*shown, *others], _rows(folder, tables, has_splits), _notes(contents, has_splits))
    return import_rows(source, output, column_of, folder, complete_listing=True)


def _tables(folder: Path) -> list[Path]:
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_clutter(f"{name}/x"))
        own = [name for each in METADATA_NAMES for name in (each, f"{each}.gz") if name in names]
        if len(own) > 1:
            raise UserError(f"{place}: both {own[0]} and {own[1]} are there: keep one")
        found += [Path(place, name) for name in own]
    if not found:
        raise UserError(f"{folder}: no metadata.jsonl, metadata.csv or metadata.parquet is there")
    return found


def _contents(folder: Path, tables: list[Path]) -> _Contents:
    contents = _Contents()
    for path in tables:
        for cells in _cells(path):
            if isinstance(cells, dict):
                contents.columns |= dict.fromkeys(cells)
                files = _files(folder, path, cells)
                contents.kinds |= files.keys()
                contents.splits.update({_split_of_path(name) for name in files.values()})
    return contents


def _rows(folder: Path, tables: list[Path], has_splits: bool) -> Iterator[TableRow | Skipped]:
    seen: Counter[str] = Counter()
    for path in tables:
        for number, cells in enumerate(_cells(path)):
            place = f"{path.relative_to(folder)} row {number}"
            if isinstance(cells, Skipped):
                yield Skipped(place, cells.reason)
                continue
            files = _files(folder, path, cells)
            if not files:
                yield Skipped(place, f"file_name names no image or audio file: {str(cells.get(_FILE_NAME))[:100]}")
                continue
            name = next(iter(files.values()))
            id = f"{name}#{seen[name]}" if seen[name] else name  # further rows of one file
            seen[name] += 1
            yield TableRow({**cells, **files}, id, split=_split_of_path(name) if has_splits else None)


def _name_column(kind: str) -> str:
    return f"{kind}_{_FILE_NAME}" if kind else _FILE_NAME


def _files(folder: Path, table: Path, cells: dict[str, Any]) -> dict[str, str]:
    """Return image and audio -> path in the folder, of a row that may have several columns of file names."""
    below = os.path.relpath(table.parent, folder)
    files: dict[str, str] = {}
    for kind in ("", *_MEDIA):
        value = cells.get(_name_column(kind))
        own = kind_of_name(value.strip()) if isinstance(value, str) else None
        if isinstance(value, str) and value.strip() and own in _MEDIA and kind in ("", own):
            files.setdefault(str(own), value if below == "." else f"{below}/{value}")
    return files


def _split_of_path(name: str) -> str | None:
    top, slash, _ = os.path.normpath(name).partition("/")
    return split_of_name(top) if slash else None


def _cells(path: Path) -> Iterator[dict[str, Any] | Skipped]:
    """Yield the rows of a table as cells by column. Raise UserError if it has no column of file names."""
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    wanted = tuple(map(_name_column, ("", *_MEDIA)))
    if ending == "jsonl":
        has_name = False
        for _, entry in json_lines(path):
            has_name = has_name or (isinstance(entry, dict) and any(name in entry for name in wanted))
            yield entry
        if not has_name:
            raise UserError(f'{path}: no line has the field "{_FILE_NAME}"')
        return
    if ending == "parquet":
        table = open_table(path)
        _check_has_name(path, table.columns, wanted)
        yield from table.rows()
        return
    text = read_table(path, wanted)
    _check_has_name(path, text.columns, wanted)
    check_doubled(path, text.columns, text.columns)
    for row in text.rows:
        yield Skipped("", row.reason) if isinstance(row, BadRow) else dict(zip(text.columns, row.cells, strict=False))


def _check_has_name(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    if not any(name in columns for name in wanted):
        raise UserError(f'{path}: no column "{_FILE_NAME}": it has {", ".join(columns)[:300]}')


def _notes(contents: _Contents, has_splits: bool) -> list[str]:
    found = [split for split in contents.splits if split is not None]
    if has_splits or not found:
        return []
    return [f"all files are of split {found[0]}: opt-ds prepare assigns splits"] if len(found) == 1 else []
