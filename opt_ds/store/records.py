"""Where facts about a store are kept that hold while its files do not change: its verification, and what plans derive from it.

They lie beside `store.json` if the store can be written, otherwise in the folder of the run that reads it.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.store.foreign import read_json_object
from opt_ds.store.index import INDEX_FILE
from opt_ds.store.schema import DVAE_FOLDER, STORE_FILE, StoreDescription

VERIFIED_FILE = "verified.json"
RUN_RECORDS = "stores"  # in a run's folder: one folder per read-only store


def is_writable(store: Path) -> bool:
    """Return whether files can be added to the store's folder."""
    return os.access(store, os.W_OK)


def run_records(store: Path, run: Path) -> Path:
    """Return the folder in the run's folder `run` that keeps the records of a read-only store. It may not exist yet."""
    place = store.resolve()
    return run / RUN_RECORDS / f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:12]}"


def record_folder(store: Path, run: Path | None) -> Path | None:
    """Return where records of this store are written. None: nowhere, it is read-only and no run's folder is given."""
    if is_writable(store):
        return store
    return None if run is None else run_records(store, run)


def store_state(path: Path, description: StoreDescription) -> dict[str, Any]:
    """Return what changes when a file of the store does: sizes and times.

    The time of the last change of status cannot be copied along with a folder.
    """
    folders = [path / description.tokenizer_folder, path / DVAE_FOLDER]
    files = [path / STORE_FILE, path / INDEX_FILE, *(path / shard.file for shard in description.shards)]
    files += [file for folder in folders for file in sorted(folder.glob("*"))]
    stats = {str(file.relative_to(path)): file.stat() for file in files if file.exists()}
    return {
        "fingerprint": description.fingerprint,
        "files": {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()},
    }


def is_recorded(folder: Path, state: dict[str, Any]) -> bool:
    """Return whether this folder records that a store in this state was verified."""
    try:
        return read_json_object(folder / VERIFIED_FILE, "") == state
    except UserError:  # never verified, or a broken record: verify again
        return False
