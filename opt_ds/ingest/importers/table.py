"""Tables with one row per sample: CSV and TSV (with a header) and Parquet.

Columns are named like manifest fields, or mapped. Parquet files may contain the image and audio files, and classes as
numbers, as written by Hugging Face `datasets`. Rows that do not match the header are reported with their line, and
unused columns are reported too.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opt_ds.decoding.file_kinds import kind_of_name
from opt_ds.errors import UserError, did_you_mean
from opt_ds.ingest.importers.common import Entry, Note, Unused, sample, split_of_name, unused_files, write_import
from opt_ds.ingest.importers.embedded import EmbeddedFiles, is_embedded, path_of
from opt_ds.ingest.importers.files import Files, Found
from opt_ds.ingest.importers.tables import BadRow, check_doubled, read_table
from opt_ds.ingest.manifest import FIELDS, Skipped

_FILES: tuple[str, ...] = ("image", "audio")
_LABEL_SEPARATOR = "|"
_BATCH_ROWS = 64  # small, because rows may contain complete images
_FIRST_TEXTS = 20  # texts that are checked for being file names
_FILE_NAME = re.compile(r"\S+")
_BETWEEN_CELLS = re.compile(r"[,;|\t\r\n]")


@dataclass(frozen=True)
class _Source:
    """A table: its columns, its rows (a Skipped for an invalid one), and findings about it."""

    path: Path
    columns: list[str]
    rows: Iterator[dict[str, Any] | Skipped]
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
    column_of = _columns(columns)
    wanted = tuple(column_of.values())
    folder = table.parent if files is None else files
    source = _parquet(table) if table.suffix.lower() == ".parquet" else _text_table(table, wanted, folder)
    _check_columns(source, column_of)
    source = _check_texts(source, column_of)
    found = Files(folder, output, "named", complete_listing=files is not None)
    embedded = EmbeddedFiles(output)

    def entries() -> Iterator[Entry]:
        yield from _entries(source, column_of, found, embedded)
        yield from _remarks(source, column_of)
        yield from unused_files([found])

    return write_import(output, entries(), source=str(table))


def _columns(columns: Sequence[str]) -> dict[str, str]:
    column_of = {field: field for field in FIELDS}
    for each in columns:
        field, equals, column = each.partition("=")
        if not equals or field not in FIELDS:
            raise UserError(f'--column "{each}": write FIELD=COLUMN{did_you_mean(field, FIELDS)}: one of {", ".join(FIELDS)}')
        column_of[field] = column
    return column_of


def _entries(source: _Source, column_of: dict[str, str], files: Files, embedded: EmbeddedFiles) -> Iterator[Entry]:
    folders: set[str] = set()
    empty: Counter[str] = Counter()
    renamed: Counter[tuple[str, str]] = Counter()
    for number, row in enumerate(source.rows):
        if isinstance(row, Skipped):
            yield row
            continue
        given = {field: row.get(column) for field, column in column_of.items()}
        given = {field: value for field, value in given.items() if not _is_missing(value)}
        empty.update(field for field in ("image", "text", "audio") if field not in given)
        id = str(given.get("id", f"row {number}"))
        where = {kind: _file(given[kind], kind, files, embedded) for kind in _FILES if kind in given}
        plain = {field: value for field, value in given.items() if field != "labels" and where.get(field) is None}
        odd = next((field for field, value in plain.items() if isinstance(value, dict | list | bytes)), None)
        if odd is not None:
            what = "files or paths" if odd in where else "plain values"
            yield Skipped(id, f"column {column_of[odd]} does not hold {what}")
            continue
        folders |= {str(given[kind]).split("/")[0] for kind in _FILES if "/" in str(given.get(kind, ""))}
        split = str(given["split"]) if "split" in given else None
        if split is not None and (meant := split_of_name(split)) not in (None, split):
            renamed[split, str(meant)] += 1
            split = meant
        yield sample(
            id,
            text=str(given["text"]) if "text" in given else None,
            files=where,
            labels=_labels(given.get("labels")),
            group=str(given["group"]) if "group" in given else None,
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


def _remarks(source: _Source, column_of: dict[str, str]) -> Iterator[Entry]:
    """Yield the unused columns of the table, and the findings about it."""
    used = set(column_of.values())
    unused = [column or "(without a name)" for column in source.columns if column not in used]
    if unused:
        near = next((name for name in unused if name.strip().lower() in FIELDS and name.strip().lower() != name), None)
        why = "" if near is None else f'--column {near.strip().lower()}="{near}" takes {near}'
        yield Unused("columns", len(unused), tuple(unused), why)
    yield from (Note(f"{source.path.name}: {note}") for note in source.notes)


def _check_texts(source: _Source, column_of: dict[str, str]) -> _Source:
    """Return the source with all its rows.

    Raise UserError if the first texts are all names of files instead of texts.
    """
    column = column_of["text"]
    first = list(itertools.islice(source.rows, _FIRST_TEXTS))
    texts = [str(row[column]) for row in first if isinstance(row, dict) and not _is_missing(row.get(column))]
    if texts and all(_FILE_NAME.fullmatch(text.strip()) and kind_of_name(text.strip()) is not None for text in texts):
        raise UserError(
            f'{source.path}: column {column} holds file names, such as "{texts[0][:100]}", and would be trained on as texts: '
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


def _check_columns(source: _Source, column_of: dict[str, str]) -> None:
    columns, table = source.columns, source.path
    named = [column for field, column in column_of.items() if column != field]
    absent = next((column for column in named if column not in columns), None)
    if absent is not None:
        near = did_you_mean(absent, columns)
        raise UserError(f'{table}: no column "{absent}"{near}: it has {", ".join(columns)[:300]}')
    if not any(column_of[field] in columns for field in ("image", "text", "audio")):
        has = ", ".join(columns)[:300]
        raise UserError(f"{table}: no column image, text or audio: it has {has}: name them with --column image=…")
    check_doubled(table, columns, tuple(column_of.values()))


def _labels(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = value.split(_LABEL_SEPARATOR) if isinstance(value, str) else value if isinstance(value, list) else [value]
    return tuple(str(part).strip() for part in parts if not _is_missing(part))


def _text_table(path: Path, wanted: Sequence[str], folder: Path) -> _Source:
    table = read_table(path, wanted)
    return _Source(path, table.columns, _text_rows(table.columns, table.rows, folder), table.notes)


def _text_rows(columns: list[str], rows: Iterator[Any], folder: Path) -> Iterator[dict[str, Any] | Skipped]:
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
        yield dict(zip(columns, row.cells, strict=False))


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


def _parquet(table: Path) -> _Source:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{table}: reading Parquet needs pyarrow: pip install 'opt_ds[tables]'") from None
    if not table.is_file():
        raise UserError(f"{table}: no such file")
    try:
        with ParquetFile(table) as file:
            schema = file.schema_arrow
            return _Source(table, list(schema.names), _parquet_rows(table, _class_names(schema.metadata or {})), [])
    except (ArrowException, OSError, ValueError):
        raise UserError(f"{table}: not a Parquet file, or truncated") from None


def _parquet_rows(table: Path, names: dict[str, list[str]]) -> Iterator[dict[str, Any] | Skipped]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(table) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    try:
                        yield {column: _named(value, names.get(column), column) for column, value in row.items()}
                    except _NoClassError as error:
                        yield Skipped(f"row {number}", str(error))
                    number += 1
    except (ArrowException, OSError, UnicodeDecodeError):
        raise UserError(f"{table}: damaged after row {number}: copy it again") from None


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return column -> names of its classes, from the metadata of Hugging Face `datasets` in a Parquet schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        inner = {column: feature.get("feature") or feature for column, feature in features.items()}
        return {column: feature["names"] for column, feature in inner.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, AttributeError, TypeError):
        return {}


class _NoClassError(Exception):
    """A number outside the classes of a ClassLabel column."""


def _named(value: Any, names: list[str] | None, column: str) -> Any:
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_named(each, names, column) for each in value]
    if not isinstance(value, int) or value >= len(names):
        raise _NoClassError(f"its label is none of the classes: column {column}: {value}, of {len(names)} classes")
    return names[value] if value >= 0 else None  # -1: no label
