"""Data folders of Kaldi: wav.scp with lines of utterance and file, and text with lines of utterance and words.

Only plain files are read. A line of wav.scp may also be a command (`sox … |`) or a place in an archive (`a.ark:17`). Such
lines are refused: nothing is executed here.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import Entry, Note, Unused, sample, split_and_file, unused_files, write_import
from opt_ds.ingest.importers.files import Files, Found
from opt_ds.ingest.manifest import Skipped
from opt_ds.ingest.text_files import open_text

_ARCHIVE = re.compile(r".+:\d+(\[.*\])?")


def import_kaldi(folders: Sequence[str], output: Path, *, audio: Path | None = None) -> Path:
    """Write the manifest `output`. The id of a sample is its utterance.

    Args:
        folders: Folders with wav.scp and text, each FOLDER or SPLIT=FOLDER.
        output: The manifest to write.
        audio: The folder that the files in wav.scp are relative to. None: the folder of wav.scp.

    Raises:
        UserError: A file is missing, a line of wav.scp is a command or a place in an archive, or the utterances are parts of
            audio files (segments).
    """
    found = [split_and_file(each) for each in folders]
    for _, folder in found:
        _check(folder)
    shared = None if audio is None else Files(audio, output, "audio")
    audio_files = [shared or Files(folder, output, "audio", complete_listing=False) for _, folder in found]

    def entries() -> Iterator[Entry]:
        for (split, folder), files in zip(found, audio_files, strict=True):
            yield from _entries(folder, split, files)
        yield from unused_files(audio_files)

    return write_import(output, entries(), source=", ".join(folders))


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: it must hold wav.scp and text")
    if _file(folder, "segments") is not None:
        raise UserError(f"{folder}: its utterances are parts of audio files (segments): write each to a file of its own")
    scp = _file(folder, "wav.scp")
    if scp is None:
        raise UserError(f"{folder}: no wav.scp is there")
    for number, _, value in _lines(scp):
        if "|" in value or value == "-":
            raise UserError(f"{scp} line {number}: a command, not a file: nothing is executed here: write the audio to files")
        if _ARCHIVE.fullmatch(value):
            raise UserError(f"{scp} line {number}: a place in an archive, not a file: write the audio to files")


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, utterance, the rest) of the lines that are not blank."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            utterance, _, rest = line.strip().replace("\t", " ").partition(" ")
            if utterance:
                yield number, utterance, rest.strip()


def _entries(folder: Path, split: str | None, audio_files: Files) -> Iterator[Entry]:
    texts: dict[str, str] = {}
    twice: set[str] = set()
    text_file, scp = _file(folder, "text"), _file(folder, "wav.scp")
    assert scp is not None, "_check runs first"
    for _, utterance, text in _lines(text_file) if text_file is not None else ():
        twice |= {utterance} if utterance in texts else set()
        texts[utterance] = text
    used: set[str] = set()
    for number, utterance, name in _lines(scp):
        used.add(utterance)
        reason = None
        if not name:
            reason = f"not an utterance and a file: {scp.name} line {number}"
        elif utterance in twice:
            reason = "its text occurs twice"
        elif text_file is not None and utterance not in texts:
            reason = "it has no text"
        if reason is not None:
            yield Skipped(utterance, reason)
            continue
        files: dict[str, tuple[str, Found] | None] = {"audio": (name, audio_files.get_or_problem(name, "audio"))}
        yield sample(utterance, text=texts.get(utterance), files=files, split=split)
    left = [utterance for utterance in texts if utterance not in used]
    if left:
        yield Unused("texts", len(left), tuple(left), f"of {folder}, wav.scp does not have them")
    if text_file is None:
        yield Note(f"{folder}: no file text is there, so its samples have no texts")
