"""Common Voice (Ardila et al. 2020): train.tsv, dev.tsv, test.tsv, validated.tsv and others, and the folder clips.

A row has path, the name of a clip, sentence, the text that was read, and more about the speaker, which is not used.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import (
    Entry,
    Note,
    Unused,
    sample,
    split_and_file,
    split_of_file,
    unused_files,
    write_import,
)
from opt_ds.ingest.importers.files import Files
from opt_ds.ingest.importers.tables import BadRow, check_doubled, read_table
from opt_ds.ingest.manifest import Skipped

_COLUMNS = ("path", "sentence")


def import_common_voice(annotations: Sequence[str], output: Path, *, audio: Path) -> Path:
    """Write the manifest `output`. The id of a sample is the name of its clip.

    Args:
        annotations: TSV files, each FILE or SPLIT=FILE. Without SPLIT, the split is that of the file's name.
        output: The manifest to write.
        audio: The folder clips.

    Raises:
        UserError: A table has no column path or sentence.
    """
    clips = Files(audio, output, "audio")

    def entries() -> Iterator[Entry]:
        for split, path in map(split_and_file, annotations):
            yield from _entries(path, split or split_of_file(path), clips)
        yield from unused_files([clips])

    return write_import(output, entries(), source=", ".join(annotations))


def _entries(path: Path, split: str | None, clips: Files) -> Iterator[Entry]:
    table = read_table(path, _COLUMNS)
    check_doubled(path, table.columns, _COLUMNS)
    absent = next((column for column in _COLUMNS if column not in table.columns), None)
    if absent is not None:
        raise UserError(f"{path}: no column {absent}: give a TSV file of Common Voice, such as validated.tsv")
    for row in table.rows:
        if isinstance(row, BadRow):
            yield Skipped(f"{path.name} row {row.number}", row.reason)
            continue
        cells = dict(zip(table.columns, row.cells, strict=False))
        name = cells["path"]
        found = clips.get(name) or clips.get_or_problem(f"{name}.mp3", "audio")  # the first releases omit the ending
        yield sample(name, text=cells["sentence"], files={"audio": (name, found)}, split=split)
    others = tuple(column for column in table.columns if column not in _COLUMNS)
    if others:
        yield Unused("columns", len(others), others, f"of {path.name}")
    yield from (Note(f"{path.name}: {note}") for note in table.notes)
