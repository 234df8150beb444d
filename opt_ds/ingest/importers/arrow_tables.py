"""Read Parquet and Arrow files, as Hugging Face `datasets` writes them, row by row with pyarrow alone.

A number of a ClassLabel feature becomes the name of its class. Files are opened for one pass each, so that any number of
them can be read one after another.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.manifest import Skipped

#: What the names of such files end with.
PARQUET, ARROW = ".parquet", ".arrow"
_BATCH_ROWS = 64  # small, because rows may contain complete images
_PARQUET_MAGIC, _ARROW_FILE_MAGIC = b"PAR1", b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff" + bytes(4)


@dataclass(frozen=True)
class ArrowTable:
    """A Parquet or Arrow file: its columns and their types, and the names of the classes of ClassLabel columns."""

    path: Path
    columns: list[str]
    types: list[str]
    class_names: dict[str, list[str]]

    def rows(self) -> Iterator[dict[str, Any] | Skipped]:
        """Yield the rows, as a Skipped for a label that is none of the classes.

        Raise UserError if the file is damaged.
        """
        number = 0
        with _damage(self.path, lambda: f"damaged after row {number}: copy it again"), _reader(self.path) as (_, batches):
            for batch in batches:
                batch.validate(full=True)  # a damaged file could make pyarrow read outside of its buffers
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                        yield self._with_names(row, number)
                        number += 1

    def _with_names(self, row: dict[str, Any], number: int) -> dict[str, Any] | Skipped:
        try:
            return {column: _named(value, self.class_names.get(column), column) for column, value in row.items()}
        except _NoClassError as error:
            return Skipped(f"row {number}", str(error))


def open_table(path: Path) -> ArrowTable:
    """Read the header of a Parquet or Arrow file. Raise UserError if it is missing, truncated or of another kind."""
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    kind = "a Parquet file" if path.suffix.lower() == PARQUET else "an Arrow file"
    with _damage(path, lambda: f"not {kind}, or truncated"), _reader(path) as (schema, _):
        return ArrowTable(path, list(schema.names), list(map(str, schema.types)), _class_names(schema.metadata or {}))


@contextmanager
def _damage(path: Path, reason: Callable[[], str]) -> Iterator[None]:
    """Raise UserError, with the reason at that time, for an error of pyarrow."""
    try:
        from pyarrow import ArrowException
    except ImportError:
        kind = "Parquet" if path.suffix.lower() == PARQUET else "Arrow"
        raise UserError(f"{path}: reading {kind} needs pyarrow: pip install 'opt_ds[tables]'") from None
    try:
        yield
    except UserError:
        raise
    except (ArrowException, OSError, ValueError):
        raise UserError(f"{path}: {reason()}") from None


@contextmanager
def _reader(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Yield the schema and the batches of a file. Its first bytes decide whether it is Parquet, Arrow, or an Arrow stream."""
    import pyarrow
    from pyarrow import ipc
    from pyarrow.parquet import ParquetFile

    with open(path, "rb") as file:
        head = file.read(len(_ARROW_FILE_MAGIC))
    if head.startswith(_PARQUET_MAGIC) or path.suffix.lower() == PARQUET:
        with ParquetFile(path) as parquet:
            yield parquet.schema_arrow, parquet.iter_batches(_BATCH_ROWS)
        return
    with pyarrow.memory_map(str(path)) as source:
        if head == _ARROW_FILE_MAGIC:
            opened = ipc.open_file(source)
            yield opened.schema, (opened.get_batch(index) for index in range(opened.num_record_batches))
            return
        stream = ipc.open_stream(source)
        yield stream.schema, _complete(path, stream)


def _complete(path: Path, stream: Any) -> Iterator[Any]:
    """Yield the batches of a stream. pyarrow ends without an error at a missing end marker, which is an error here."""
    yield from stream
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - len(_END_OF_STREAM)))
        if file.read() != _END_OF_STREAM:
            raise UserError(f"{path}: its end marker is missing, so it is truncated: copy it again")


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return column -> names of its classes, from the metadata of Hugging Face `datasets` in a schema."""
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
