"""Tables with one row per sample: CSV and TSV (with a header) and Parquet.

Columns are named like manifest fields, or mapped. Parquet files may contain the image and audio files, lists of texts,
and classes as numbers, as written by Hugging Face `datasets` (see arrow_tables.py; for several files, hugging_face.py).
Rows that do not match the header are reported with their line, and unused columns are reported too.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opt_ds.decoding.file_kinds import kind_of_name
from opt_ds.errors import UserError, did_you_mean
from opt_ds.ingest.importers.arrow_tables import ARROW, PARQUET, open_table
from opt_ds.ingest.importers.captions import captions_of, samples_of_captions
from opt_ds.ingest.importers.common import Entry, Note, Unused, split_of_name, unused_files, write_import
from opt_ds.ingest.importers.embedded import EmbeddedFiles, is_embedded, path_of
from opt_ds.ingest.importers.files import Files, Found
from opt_ds.ingest.importers.tables import BadRow, check_doubled, read_table
from opt_ds.ingest.manifest import FIELDS, Skipped

_FILES: tuple[str, ...] = ("image", "audio")
_LABEL_SEPARATOR = "|"
_FIRST_TEXTS = 20  # texts that are checked for being file names
_FILE_NAME = re.compile(r"\S+")
_BETWEEN_CELLS = re.compile(r"[,;|\t\r\n]")


@dataclass(frozen=True)
class TableRow:
    """A row. `name` is the id of a row without an id. `prefix` precedes an id of the table, `split` is that of its file."""

    cells: dict[str, Any]
    name: str
    prefix: str = ""
    split: str | None = None


@dataclass(frozen=True)
class TableSource:
    """One or several tables: name, columns, rows (a Skipped for an invalid one), and findings about them."""

    name: str
    columns: list[str]
    rows: Iterator[TableRow | Skipped]
    notes: list[str]


def import_table(
    table: Path,
    output: Path,
    *,
    files: Path | None = None,
    columns: Sequence[str] = (),
) -> Path:
    """Write the manifest `output` for a table.

    Without an id column the number of the row is the id. Labels are a list (Parquet) or separated by "|". Files inside
    a Parquet table (see importers/embedded.py) are written to `<name>-files/` next to the manifest. A number of a
    ClassLabel feature is converted to the name of the class.

    Args:
        table: The CSV, TSV or Parquet file.
        output: The manifest to write.
        files: The folder that paths are relative to. None: the folder of the table.
        columns: FIELD=COLUMN for columns with other names than the manifest's fields.
    """
    column_of = parse_columns(columns)
    folder = table.parent if files is None else files
    is_arrow = table.suffix.lower() in (PARQUET, ARROW)
    source = _arrow_table(table) if is_arrow else _text_table(table, tuple(column_of.values()), folder)
    return import_rows(source, output, column_of, folder, complete_listing=files is not None)


def import_rows(source: TableSource, output: Path, column_of: dict[str, str], folder: Path, *, complete_listing: bool) -> Path:
    """Write the manifest `output` for the rows of tables.

    Args:
        source: The tables.
        output: The manifest to write.
        column_of: Field -> column, from `parse_columns`.
        folder: The folder that paths are relative to.
        complete_listing: Report all files of the folder that no row names, not only those next to a file that was found.
    """
    _check_columns(source, column_of)
    checked = _check_texts(source, column_of)
    found = Files(folder, output, "named", complete_listing=complete_listing)
    embedded = EmbeddedFiles(output)

    def entries() -> Iterator[Entry]:
        yield from _entries(checked, column_of, found, embedded)
        yield from _remarks(source, column_of)
        yield from unused_files([found])

    return write_import(output, entries(), source=source.name)


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """Return field -> column for values of --column, FIELD=COLUMN. Raise UserError for another form."""
    column_of = {field: field for field in FIELDS}
    for each in columns:
        field, equals, column = each.partition("=")
        if not equals or field not in FIELDS:
            raise UserError(f'--column "{each}": write FIELD=COLUMN{did_you_mean(field, FIELDS)}: one of {", ".join(FIELDS)}')
        column_of[field] = column
    return column_of


def _entries(source: TableSource, column_of: dict[str, str], files: Files, embedded: EmbeddedFiles) -> Iterator[Entry]:
    folders: set[str] = set()
    empty: Counter[str] = Counter()
    renamed: Counter[tuple[str, str]] = Counter()
    for row in source.rows:
        if isinstance(row, Skipped):
            yield row
            continue
        given = {field: row.cells.get(column) for field, column in column_of.items()}
        given = {field: value for field, value in given.items() if not _is_missing(value)}
        empty.update(field for field in ("image", "text", "audio") if field not in given)
        id = row.prefix + str(given["id"]) if "id" in given else row.name
        where = {kind: _file(given[kind], kind, files, embedded) for kind in _FILES if kind in given}
        texts = _texts(given.get("text"))
        plain = {field: value for field, value in given.items() if field not in ("labels", "text") and where.get(field) is None}
        plain |= {"text": given["text"]} if texts is None else {}
        odd = next((field for field, value in plain.items() if isinstance(value, dict | list | bytes)), None)
        if odd is not None:
            what = "files or paths" if odd in where else "plain values"
            yield Skipped(id, f"column {column_of[odd]} does not hold {what}")
            continue
        folders |= {str(given[kind]).split("/")[0] for kind in _FILES if "/" in str(given.get(kind, ""))}
        split = str(given["split"]) if "split" in given else row.split
        if split is not None and (meant := split_of_name(split)) not in (None, split):
            renamed[split, str(meant)] += 1
            split = meant
        yield from samples_of_captions(
            id,
            texts or (),
            files=where,
            labels=_labels(given.get("labels")),
            group=str(given["group"]) if "group" in given else id if len(texts or ()) > 1 and "image" not in where else None,
            split=split,
        )
    for field, count in empty.items():
        if column_of[field] in source.columns:
            yield Note(f"rows whose column {column_of[field]} is empty: {count}")
    if renamed:
        what = ", ".join(f'"{given}" is {meant} ({count} rows)' for (given, meant), count in renamed.most_common())
        yield Note(f"splits in column {column_of['split']}: {what}")
    splits = sorted({folder for folder in folders if split_of_name(folder)})
    if len(splits) > 1 and column_of["split"] not in source.columns:
        yield Note(
            f"its files lie in folders {', '.join(splits)}, but it has no column split: opt-ds prepare will assign splits "
            "by a hash of the groups, whatever the folders are"
        )


def _remarks(source: TableSource, column_of: dict[str, str]) -> Iterator[Entry]:
    """Yield the unused columns of the table, and the findings about it."""
    used = set(column_of.values())
    unused = [column or "(without a name)" for column in source.columns if column not in used]
    if unused:
        near = next((name for name in unused if name.strip().lower() in FIELDS and name.strip().lower() != name), None)
        why = "" if near is None else f'--column {near.strip().lower()}="{near}" takes {near}'
        yield Unused("columns", len(unused), tuple(unused), why)
    yield from map(Note, source.notes)


def _check_texts(source: TableSource, column_of: dict[str, str]) -> TableSource:
    """Return the source with all its rows.

    Raise UserError if the first texts are all names of files instead of texts.
    """
    column = column_of["text"]
    first = list(itertools.islice(source.rows, _FIRST_TEXTS))
    cells = [row.cells.get(column) for row in first if isinstance(row, TableRow)]
    texts = [str(cell) for cell in cells if not _is_missing(cell)]
    if texts and all(_FILE_NAME.fullmatch(text.strip()) and kind_of_name(text.strip()) is not None for text in texts):
        raise UserError(
            f'{source.name}: column {column} holds file names, such as "{texts[0][:100]}", and would be trained on as texts: '
            "put the texts themselves there, or name the column of the texts: --column text=COLUMN"
        )
    return replace(source, rows=itertools.chain(first, source.rows))


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _file(value: Any, kind: str, files: Files, embedded: EmbeddedFiles) -> tuple[str, Found] | None:
    """Return (name, path or None if missing) of an image or audio file; None for a value that is neither."""
    if is_embedded(value):
        written = embedded.take(value)
        if written is not None:
            return path_of(value) or "embedded file", written
        name = path_of(value)
        return ("no bytes and no path", None) if name is None else (name, files.get_or_problem(name, kind))
    return (str(value), files.get_or_problem(str(value), kind)) if not isinstance(value, dict | list) else None


def _check_columns(source: TableSource, column_of: dict[str, str]) -> None:
    columns, table = source.columns, source.name
    named = [column for field, column in column_of.items() if column != field]
    absent = next((column for column in named if column not in columns), None)
    if absent is not None:
        near = did_you_mean(absent, columns)
        raise UserError(f'{table}: no column "{absent}"{near}: it has {", ".join(columns)[:300]}')
    if not any(column_of[field] in columns for field in ("image", "text", "audio")):
        has = ", ".join(columns)[:300]
        raise UserError(f"{table}: no column image, text or audio: it has {has}: name them with --column image=…")
    check_doubled(table, columns, tuple(column_of.values()))


def _texts(value: Any) -> list[str] | None:
    """Return the texts of a cell: one, several of a list, or none; None for a cell that holds something else."""
    if isinstance(value, dict | bytes):
        return None
    try:
        return captions_of(value if isinstance(value, list) or value is None else str(value), "the text")
    except TypeError:
        return None


def _labels(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = value.split(_LABEL_SEPARATOR) if isinstance(value, str) else value if isinstance(value, list) else [value]
    return tuple(str(part).strip() for part in parts if not _is_missing(part))


def _text_table(path: Path, wanted: Sequence[str], folder: Path) -> TableSource:
    table = read_table(path, wanted)
    notes = [f"{path.name}: {note}" for note in table.notes]
    return TableSource(str(path), table.columns, _text_rows(table.columns, table.rows, folder), notes)


def _text_rows(columns: list[str], rows: Iterator[Any], folder: Path) -> Iterator[TableRow | Skipped]:
    before: set[str] = set()  # file names in earlier rows
    for row in rows:
        if isinstance(row, BadRow):
            yield Skipped(f"row {row.number}", row.reason)
            continue
        swallowed = next((name for cell in row.cells if (name := _swallowed(cell, before, folder)) is not None), None)
        if swallowed is not None:
            reason = f'a quoted cell holds several lines and "{swallowed}": is a quote missing'
            yield Skipped(f"row {row.number}", f"not a row of the table: line {row.line}: {reason}?")
            continue
        before.update(cell for cell in row.cells if kind_of_name(cell) in _FILES)
        yield TableRow(dict(zip(columns, row.cells, strict=False)), f"row {row.number}")


def _swallowed(cell: str, before: set[str], folder: Path) -> str | None:
    """Return the name of a file that exists, or that an earlier row names, from a cell of several lines; else None.

    It most likely belongs to another row, after a quote that was not closed. A text may mention other file names.
    """
    if "\n" not in cell and "\r" not in cell:
        return None
    names = (part.strip(' "') for part in _BETWEEN_CELLS.split(cell))
    return next((each for each in names if kind_of_name(each) in _FILES and (each in before or _is_file(folder / each))), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long or contains NUL
        return False


def _arrow_table(path: Path) -> TableSource:
    table = open_table(path)

    def rows() -> Iterator[TableRow | Skipped]:
        for number, row in enumerate(table.rows()):
            yield row if isinstance(row, Skipped) else TableRow(row, f"row {number}")

    return TableSource(str(path), table.columns, rows(), [])
