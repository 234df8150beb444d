"""Hugging Face `datasets` on disk: folders of `save_to_disk` (Arrow), and Parquet shards as the Hub stores them.

A folder of `save_to_disk` has state.json, which lists its Arrow files. That of a DatasetDict has dataset_dict.json, which
lists its splits, each a folder of the former kind. The names of Parquet shards on the Hub begin with the split:
`data/train-00000-of-00012.parquet`. Cells of Image and Audio features contain the files (see embedded.py). Rows become
samples as in table.py.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.importers.arrow_tables import ARROW, PARQUET, ArrowTable, open_table
from opt_ds.ingest.importers.common import split_and_file, split_of_name
from opt_ds.ingest.importers.shards import find_shards, named_together, shard_names
from opt_ds.ingest.importers.table import TableRow, TableSource, import_rows, parse_columns
from opt_ds.ingest.manifest import Skipped
from opt_ds.ingest.text_files import read_json

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_SHARD = re.compile(r"(.+)-[0-9]{5,}-of-[0-9]{5,}")


@dataclass(frozen=True)
class _Piece:
    """A file of a data set. `split` is what its folder or name says; `named` is the split that the user gave."""

    path: Path
    split: str | None = None
    named: str | None = None


def import_hugging_face(
    sources: Sequence[str], output: Path, *, files: Path | None = None, columns: Sequence[str] = ()
) -> Path:
    """Write the manifest `output` for data sets on disk.

    The images and audio in them are written to `<name>-files/` next to the manifest. The splits of a DatasetDict, and those
    in the names of Parquet shards, are used if there are several.

    Args:
        sources: [SPLIT=]PATTERN of folders or files (see shards.py).
        output: The manifest to write.
        files: The folder that paths in the cells are relative to. None: the folder of the first file.
        columns: FIELD=COLUMN for columns with other names than the manifest's fields.

    Raises:
        UserError: A file is missing, damaged, or has other columns than the first one.
    """
    column_of = parse_columns(columns)
    pieces = _with_splits([piece for source in sources for piece in _pieces(source)])
    tables = [open_table(piece.path) for piece in pieces]
    for table in tables:
        _check_same_columns(table, tables[0])
    doubled = [path for path, count in Counter(os.path.realpath(piece.path) for piece in pieces).items() if count > 1]
    if doubled:
        raise UserError(f"{doubled[0]}: it is named twice: name each file once")
    has_split = column_of["split"] in tables[0].columns
    notes = _notes(pieces, has_split)
    pieces = [replace(piece, named=None) for piece in pieces] if has_split else pieces
    source = TableSource(named_together(sources), tables[0].columns, _rows(pieces, tables), notes)
    return import_rows(source, output, column_of, files or pieces[0].path.parent, complete_listing=files is not None)


def _rows(pieces: list[_Piece], tables: list[ArrowTable]) -> Iterator[TableRow | Skipped]:
    names = shard_names([piece.path for piece in pieces])
    for piece, name, table in zip(pieces, names, tables, strict=True):
        prefix = f"{piece.named}/" if piece.named is not None else ""
        for number, row in enumerate(table.rows()):
            own = f"{name}/row {number}"
            yield Skipped(own, row.reason) if isinstance(row, Skipped) else TableRow(row, own, prefix, piece.named)


def _pieces(source: str) -> Iterator[_Piece]:
    """Yield the files that an argument names."""
    split, pattern = split_and_file(source)
    if pattern.is_dir():
        yield from (replace(piece, named=split) for piece in _pieces_of_folder(pattern))
        return
    for shard in find_shards([source], (PARQUET, ARROW)):
        if shard.path.is_dir():
            yield from (replace(piece, named=split) for piece in _pieces_of_folder(shard.path))
        else:
            yield _Piece(shard.path, _split_of_shard(shard.path), split)


def _pieces_of_folder(folder: Path) -> Iterator[_Piece]:
    if (folder / _SPLITS).is_file():
        splits = _texts(read_json(folder / _SPLITS), "splits")
        if not splits:
            raise UserError(f'{folder / _SPLITS}: no list "splits" of names')
        for split in splits:
            if not (folder / split / _STATE).is_file():
                raise UserError(f"{folder / split}: {_STATE} is missing there, although {_SPLITS} names the split: copy it again")
            yield from (replace(piece, split=split) for piece in _saved(folder / split))
    elif (folder / _STATE).is_file():
        yield from _saved(folder)
    else:
        yield from _hub(folder)


def _saved(folder: Path) -> Iterator[_Piece]:
    """Yield the Arrow files of a folder of `save_to_disk`."""
    state = read_json(folder / _STATE)
    entries = state.get("_data_files") if isinstance(state, dict) else None
    listed = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or ()]
    files = _texts({"files": listed}, "files")
    if not isinstance(state, dict) or not files:
        raise UserError(f'{folder / _STATE}: no list "_data_files" of file names')
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"{folder / _STATE}: its rows are selected by a file of indices, which is not supported: call flatten_indices() and "
            "save_to_disk again"
        )
    split = state.get("_split")
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: no such file, although {_STATE} names it: copy it again")
        yield _Piece(folder / file, split if isinstance(split, str) else None)


def _hub(folder: Path) -> Iterator[_Piece]:
    """Yield the Parquet shards of a folder as on the Hub: in it, or in its folder data."""
    shards = [folder, folder / "data"]
    found = next((each for each in shards if each.is_dir() and any(path.suffix == PARQUET for path in each.iterdir())), None)
    if found is None:
        raise UserError(f"{folder}: neither {_STATE}, {_SPLITS} nor *{PARQUET} is there or in data: name the folder with them")
    for shard in find_shards([str(found)], (PARQUET,)):
        yield _Piece(shard.path, _split_of_shard(shard.path))


def _texts(content: Any, name: str) -> list[str] | None:
    """Return a list of plain file names of a JSON object; None for anything else."""
    value = content.get(name) if isinstance(content, dict) else None
    if not isinstance(value, list):
        return None
    are_plain = all(isinstance(each, str) and each not in ("", ".", "..") and not re.search(r"[/\0]", each) for each in value)
    return value if are_plain else None


def _split_of_shard(path: Path) -> str | None:
    match = _SHARD.fullmatch(path.stem)
    return match[1] if match else None


def _with_splits(pieces: list[_Piece]) -> list[_Piece]:
    """Return the pieces with `named` set: from the user, or from folders and names if these are several splits."""
    if any(piece.named is not None for piece in pieces):
        return pieces
    known = {piece.split for piece in pieces}
    if len(known) < 2 or None in known:
        return pieces
    return [replace(piece, named=split_of_name(str(piece.split)) or piece.split) for piece in pieces]


def _notes(pieces: list[_Piece], has_split: bool) -> list[str]:
    found = Counter((str(piece.split), piece.named) for piece in pieces if piece.split is not None)
    if has_split:
        return ["the splits are those of the column"] if found else []
    if any(named is not None for _, named in found):
        renamed = ", ".join(f'"{split}" is {named}' for split, named in found if named not in (None, split))
        return [f"splits of the files: {renamed}"] if renamed else []
    return [f"all files are of split {split}: opt-ds prepare assigns splits" for split, _ in found] if len(found) == 1 else []


def _check_same_columns(table: ArrowTable, first: ArrowTable) -> None:
    ours, theirs = (dict(zip(each.columns, each.types, strict=True)) for each in (table, first))
    if ours == theirs:
        return
    odd = next(name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name))
    if odd not in ours or odd not in theirs:
        what = f'column "{odd}" is only in {table.path.name if odd in ours else first.path.name}'
    else:
        what = f'column "{odd}" is {ours[odd][:60]}, not {theirs[odd][:60]}'
    raise UserError(f"{table.path}: other columns than in {first.path}: {what}: import it on its own")
