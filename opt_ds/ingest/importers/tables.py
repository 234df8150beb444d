"""Strict reading of CSV and TSV: each row is returned as it was written, or reported with its line.

`read_rows` returns the rows unchanged. `read_table` uses the first row as the header, and detects the separator and the
quoting.
"""

import csv
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from opt_ds.errors import UserError
from opt_ds.ingest.text_files import open_text

_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_SEP_LINE = re.compile(r"sep=(.)")  # first line that Excel writes and reads


@dataclass(frozen=True)
class Row:
    """A row. `number` counts from 0 without blank lines; `line` is its first line in the file, from 1."""

    number: int
    line: int
    cells: list[str]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and the reason."""

    number: int
    line: int
    reason: str


@dataclass(frozen=True)
class Table:
    """A table with a header. `notes` are findings about the file, for the user. `rows` can be iterated once."""

    columns: list[str]
    rows: Iterator[Row | BadRow]
    notes: list[str]


def is_tsv(path: Path) -> bool:
    """Return whether the name of a file means that its cells are separated by tabs."""
    return path.name.lower().removesuffix(".gz").endswith((".tsv", ".tab"))


def read_rows(path: Path, separator: str, *, quoted: bool) -> Iterator[Row]:
    """Yield the rows of a UTF-8 table, gzipped or not. Blank lines are skipped.

    Without `quoted`, quotes are ordinary characters, as in the published TSV files. Raise UserError, with the line, for
    a quote that is never closed and for text after a closing quote, because what follows cannot be trusted.
    """
    csv.field_size_limit(sys.maxsize)
    with open_text(path) as file:
        reader = csv.reader(
            file, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True
        )
        number, line = 0, 1
        try:
            for cells in reader:
                if cells:
                    yield Row(number, line, cells)
                    number += 1
                line = reader.line_num + 1
        except csv.Error:
            raise UserError(
                f"{path} line {line}: a quote that opens a cell there is not closed properly: close it, or write "
                'quotes inside of a cell twice ("")'
            ) from None


def read_table(path: Path, wanted: Collection[str]) -> Table:
    """Read a table whose first row names its columns. `wanted` columns are used to detect the separator.

    Rows with fewer or more cells than the header, with NUL characters or equal to the header are returned as BadRow.
    """
    named = "\t" if is_tsv(path) else ","
    separator, notes = _separator(path, named, wanted)
    quoted = separator != "\t" or is_quoted_tsv(path)
    if separator == "\t" and quoted:
        notes.append("its cells are quoted")
    rows = read_rows(path, separator, quoted=quoted)
    header = next(rows, None)
    if header is not None and len(header.cells) <= 2 and _SEP_LINE.match(separator.join(header.cells)):
        header = next(rows, None)
    if header is None:
        raise UserError(f"{path}: the table has no lines")
    return Table(header.cells, _checked(rows, header), notes)


def check_doubled(path: Path | str, columns: Collection[str], used: Collection[str]) -> None:
    """Raise UserError if a used column occurs twice."""
    doubled = [name for name, count in Counter(columns).items() if count > 1 and name in used]
    if doubled:
        raise UserError(f'{path}: column "{doubled[0]}" occurs twice: rename one of them')


def _checked(rows: Iterator[Row], header: Row) -> Iterator[Row | BadRow]:
    number = -1
    for number, row in enumerate(rows):
        reason = ""
        if row.cells == header.cells:
            reason = "the header again"
        elif any("\0" in cell for cell in row.cells):
            reason = "a NUL character in it"
        elif any(row.cells[len(header.cells) :]) or len(row.cells) < len(header.cells):
            reason = f"{len(row.cells)} cells where the header has {len(header.cells)}"
        if reason:
            yield BadRow(number, row.line, f"not a row of the table: line {row.line}: {reason}")
        else:
            yield Row(number, row.line, row.cells)


def _separator(path: Path, named: str, wanted: Collection[str]) -> tuple[str, list[str]]:
    """Return the separator suggested by the name, or another one if only that one yields a wanted column."""
    with open_text(path) as file:
        first = file.readline(1 << 20).rstrip("\r\n")
    excel = _SEP_LINE.fullmatch(first)
    if excel is not None:
        return excel[1], []
    found = {separator: _cells(first, separator) & set(wanted) for separator in _SEPARATORS}
    best = max(found, key=lambda separator: len(found[separator]))
    if len(found[best]) > len(found[named]):
        return best, [f"its cells are separated by {_SEPARATORS[best]}"]
    return named, []


def _cells(line: str, separator: str) -> set[str]:
    return {cell.strip('"') for cell in line.split(separator)}


def is_quoted_tsv(path: Path) -> bool:
    """Return whether the cells of a TSV file are quoted as by spreadsheets and pandas.

    That is the case if there is evidence of quoting, and if all rows have the same number of cells when read so.
    """
    first: list[str] = []
    opens = misfit = doubled = False
    for row in read_rows(path, "\t", quoted=False):
        first = first or row.cells
        misfit = misfit or len(row.cells) != len(first)
        opening = [cell for cell in row.cells if cell.startswith('"')]
        opens = opens or bool(opening)
        doubled = doubled or any('""' in cell[1:-1] and cell.endswith('"') for cell in opening)
    all_quoted = bool(first) and all(len(name) > 1 and name.startswith('"') and name.endswith('"') for name in first)
    if not opens or not (misfit or doubled or all_quoted):
        return False
    try:
        return len({len(row.cells) for row in read_rows(path, "\t", quoted=True)}) == 1
    except UserError:
        return False
