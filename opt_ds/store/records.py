"""Where facts about a store are kept that hold while its files do not change: its verification, and what plans derive from it.

They lie beside `store.json` if the store can be written, otherwise in the folder of the run that reads it. Commands outside a
run record the verification of a read-only store in the user's cache, `$XDG_CACHE_HOME/opt_ds/stores` (`~/.cache/…`).
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
    return run / RUN_RECORDS / _name(store)


def user_records(store: Path) -> Path | None:
    """Return the folder in the user's cache that keeps the verification of a read-only store. None: there is no such cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # also where none is set; a relative one is to be ignored
        cache = os.path.expanduser("~/.cache")
    return Path(cache) / "opt_ds" / RUN_RECORDS / _name(store) if os.path.isabs(cache) else None


def record_folder(store: Path, run: Path | None) -> Path | None:
    """Return where records of this store are written. None: nowhere, it is read-only and no run's folder is given."""
    if is_writable(store):
        return store
    return None if run is None else run_records(store, run)


def verification_folders(store: Path, run: Path | None) -> list[Path]:
    """Return where a store's verification may be recorded, the place that is preferred first."""
    if is_writable(store):
        return [store]
    folders = (None if run is None else run_records(store, run), user_records(store))
    return [folder for folder in folders if folder is not None]


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


def _name(store: Path) -> str:
    place = store.resolve()
    return f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:12]}"
