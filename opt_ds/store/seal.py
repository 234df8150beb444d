"""Recorded hashes of a folder's files.

They are written when the folder is complete and checked before a file is used.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from opt_ds.errors import UserError
from opt_ds.store.files import file_sha256, write_json
from opt_ds.store.foreign import is_inside, is_plain_name, read_json_object

SEAL_FILE = "opt_ds_files.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def seal_folder(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write `folder/opt_ds_files.json`: the SHA-256 of these files, by default of all files in the folder tree."""
    if names is None:
        files = (Path(at) / name for at, _, inner in os.walk(folder) for name in inner)
        names = (str(file.relative_to(folder)) for file in files if file != folder / SEAL_FILE)
    write_json(folder / SEAL_FILE, {"sha256": {name: file_sha256(folder / name) for name in sorted(names)}})


def check_seal(folder: Path, remedy: str) -> bool:
    """Compare the files of a folder with its recorded hashes.

    Return False if it has none, as folders of older versions. Raise UserError, naming the first file that is missing or
    damaged, or the record itself.
    """
    record = folder / SEAL_FILE
    if not record.is_file():
        return False
    found = read_json_object(record, remedy)
    hashes = found.get("sha256")
    if found.keys() != {"sha256"} or not isinstance(hashes, dict) or not hashes:
        raise UserError(f"{record}: damaged: {remedy}")
    for name, expected in hashes.items():
        if not all(is_plain_name(part) for part in name.split("/")) or not _SHA256.fullmatch(str(expected)):
            raise UserError(f"{record}: damaged (entry {name!r}): {remedy}")
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing: {remedy}")
        if not is_inside(folder, file):
            raise UserError(f"{file}: leads out of {folder}: {remedy}")
        if file_sha256(file) != expected:
            raise UserError(f"{file}: damaged (its SHA-256 differs from {SEAL_FILE}'s): {remedy}")
    return True
