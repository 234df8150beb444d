"""Tables with a row a sample: CSV, TSV (with a header) and Parquet. Columns are called as the manifest's fields, or named.

Parquet may hold the pictures and recordings themselves, and classes as numbers, as Hugging Face `datasets` writes it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError, did_you_mean
from opt_ds.prepare.importers.common import Files, read_rows, sample, write_import
from opt_ds.prepare.importers.embedded import EmbeddedFiles, is_embedded, path_of
from opt_ds.prepare.manifest import ManifestLine, Skipped

_FIELDS = tuple(ManifestLine.model_fields)
_FILES: tuple[str, ...] = ("image", "audio")
_LABEL_SEPARATOR = "|"
_BATCH_ROWS = 64  # rows may hold whole pictures


def import_table(
    table: Path,
    output: Path,
    *,
    files: Path | None = None,
    columns: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Write the manifest `output`. `columns`: FIELD=COLUMN for columns of other names; `files`: what paths are relative to.

    Without an id column the row's number is the id. Labels are a list (Parquet) or separated by "|". Files inside a Parquet
    table (see importers/embedded.py) are written to `<name>-files/` beside the manifest; a label that is a number of its
    ClassLabel feature becomes the class's name.
    """
    rows = _parquet_rows(table) if table.suffix.lower() == ".parquet" else _text_rows(table)
    column_of = _columns(columns)
    found = Files(table.parent if files is None else files, output, "named")
    embedded = EmbeddedFiles(output)
    return write_import(output, _entries(rows, column_of, table, found, embedded), say, source=str(table))


def _columns(columns: Sequence[str]) -> dict[str, str]:
    column_of = {field: field for field in _FIELDS}
    for each in columns:
        field, equals, column = each.partition("=")
        if not equals or field not in _FIELDS:
            raise UserError(f'--column "{each}": write FIELD=COLUMN{did_you_mean(field, _FIELDS)}: one of {", ".join(_FIELDS)}')
        column_of[field] = column
    return column_of


def _entries(
    rows: Iterator[dict[str, Any]], column_of: dict[str, str], table: Path, files: Files, embedded: EmbeddedFiles
) -> Iterator[ManifestLine | Skipped]:
    for number, row in enumerate(rows):
        if number == 0:
            _check_columns(row, column_of, table)
        given = {field: row.get(column) for field, column in column_of.items()}
        given = {field: value for field, value in given.items() if value is not None and value != ""}
        id = str(given.get("id", f"row {number}"))
        where = {kind: _file(given[kind], files, embedded) for kind in _FILES if kind in given}
        plain = {field: value for field, value in given.items() if field != "labels" and where.get(field) is None}
        odd = next((field for field, value in plain.items() if isinstance(value, dict | list | bytes)), None)
        if odd is not None:
            what = "files or paths" if odd in where else "plain values"
            yield Skipped(id, f"column {column_of[odd]} does not hold {what}")
            continue
        yield sample(
            id,
            text=str(given["text"]) if "text" in given else None,
            files=where,
            labels=_labels(given.get("labels")),
            group=str(given["group"]) if "group" in given else None,
            split=str(given["split"]) if "split" in given else None,
        )


def _file(value: Any, files: Files, embedded: EmbeddedFiles) -> tuple[str, str | None] | None:
    """Return (name, where it lies, None if it is missing) of a picture or recording; None for a value that is neither."""
    if is_embedded(value):
        written = embedded.take(value)
        if written is not None:
            return written, written
        name = path_of(value)
        return ("no bytes and no path", None) if name is None else (name, files.get(name))
    return (str(value), files.get(str(value))) if not isinstance(value, dict | list) else None


def _check_columns(row: dict[str, Any], column_of: dict[str, str], table: Path) -> None:
    named = [column for field, column in column_of.items() if column != field]
    absent = next((column for column in named if column not in row), None)
    if absent is not None:
        raise UserError(f'{table}: no column "{absent}"{did_you_mean(absent, row)}: it has {", ".join(row)}')
    if not any(column_of[field] in row for field in ("image", "text", "audio")):
        raise UserError(f"{table}: no column image, text or audio: it has {', '.join(row)}: name them with --column image=…")


def _labels(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = value.split(_LABEL_SEPARATOR) if isinstance(value, str) else value if isinstance(value, list) else [value]
    return tuple(str(part).strip() for part in parts)


def _text_rows(table: Path) -> Iterator[dict[str, Any]]:
    rows = read_rows(table, "\t" if table.name.lower().removesuffix(".gz").endswith((".tsv", ".tab")) else ",")
    header = next(rows, None)
    if header is None:
        raise UserError(f"{table}: the table has no lines")
    for row in rows:
        yield dict(zip(header, row, strict=False))


def _parquet_rows(table: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{table}: reading Parquet needs pyarrow: pip install 'opt_ds[tables]'") from None
    if not table.is_file():
        raise UserError(f"{table}: no such file")
    try:
        with ParquetFile(table) as file:
            names = _class_names(file.schema_arrow.metadata or {})
            for batch in file.iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield {column: _named(value, names.get(column)) for column, value in row.items()}
    except ArrowInvalid as error:
        raise UserError(f"{table}: not a Parquet file ({str(error).splitlines()[0]})") from None


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Column -> names of its classes, from what Hugging Face `datasets` notes in a Parquet file's schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        inner = {column: feature.get("feature") or feature for column, feature in features.items()}
        return {column: feature["names"] for column, feature in inner.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, AttributeError, TypeError):
        return {}


def _named(value: Any, names: list[str] | None) -> Any:
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None  # -1: no label
