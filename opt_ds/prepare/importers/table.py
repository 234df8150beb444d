"""Tables with a row a sample: CSV, TSV (with a header) and Parquet. Columns are called as the manifest's fields, or named."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError, did_you_mean
from opt_ds.prepare.importers.common import Files, read_rows, sample, write_import
from opt_ds.prepare.manifest import ManifestLine, Skipped

_FIELDS = tuple(ManifestLine.model_fields)
_LABEL_SEPARATOR = "|"
_BATCH_ROWS = 4096


def import_table(
    table: Path,
    output: Path,
    *,
    files: Path | None = None,
    columns: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Write the manifest `output`. `columns`: FIELD=COLUMN for columns of other names; `files`: what paths are relative to.

    Without an id column the row's number is the id. Labels are a list (Parquet) or separated by "|".
    """
    rows = _parquet_rows(table) if table.suffix.lower() == ".parquet" else _text_rows(table)
    column_of = _columns(columns)
    found = Files(table.parent if files is None else files, output, "named")
    return write_import(output, _entries(rows, column_of, table, found), say, source=str(table))


def _columns(columns: Sequence[str]) -> dict[str, str]:
    column_of = {field: field for field in _FIELDS}
    for each in columns:
        field, equals, column = each.partition("=")
        if not equals or field not in _FIELDS:
            raise UserError(f'--column "{each}": write FIELD=COLUMN{did_you_mean(field, _FIELDS)}: one of {", ".join(_FIELDS)}')
        column_of[field] = column
    return column_of


def _entries(
    rows: Iterator[dict[str, Any]], column_of: dict[str, str], table: Path, files: Files
) -> Iterator[ManifestLine | Skipped]:
    for number, row in enumerate(rows):
        if number == 0:
            _check_columns(row, column_of, table)
        given = {field: row.get(column) for field, column in column_of.items()}
        given = {field: value for field, value in given.items() if value is not None and value != ""}
        id = str(given.get("id", f"row {number}"))
        plain = {field: value for field, value in given.items() if field != "labels"}
        odd = next((field for field, value in plain.items() if isinstance(value, dict | list | bytes)), None)
        if odd is not None:
            yield Skipped(id, f"column {column_of[odd]} holds no plain value: give paths and texts")
            continue
        yield sample(
            id,
            text=str(given["text"]) if "text" in given else None,
            files={kind: (str(given[kind]), files.get(str(given[kind]))) for kind in ("image", "audio") if kind in given},
            labels=_labels(given.get("labels")),
            group=str(given["group"]) if "group" in given else None,
            split=str(given["split"]) if "split" in given else None,
        )


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
    parts = value.split(_LABEL_SEPARATOR) if isinstance(value, str) else value
    return tuple(str(part).strip() for part in parts)


def _text_rows(table: Path) -> Iterator[dict[str, Any]]:
    rows = read_rows(table, "\t" if table.suffixes[:1] in ([".tsv"], [".tab"]) else ",")
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
            for batch in file.iter_batches(_BATCH_ROWS):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise UserError(f"{table}: not a Parquet file ({str(error).splitlines()[0]})") from None
