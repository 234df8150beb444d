"""Locations of records about a store: its verification, and data derived for step plans.

Records are valid while the files of the store do not change. They are stored next to `store.json` if the store is
writable, otherwise in the folder of the run that reads it. Commands outside a run record the verification of a
read-only store in the user's cache, `$XDG_CACHE_HOME/opt_ds/stores` (`~/.cache/…`).
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.store.clusters import CLUSTER_FILES
from opt_ds.store.foreign import read_json_object
from opt_ds.store.index import INDEX_FILE
from opt_ds.store.schema import DVAE_FOLDER, STORE_FILE, StoreDescription

VERIFIED_FILE = "verified.json"
RUN_RECORDS = "stores"  # in a run's folder: one subfolder per read-only store


def is_writable(store: Path) -> bool:
    """Return whether files can be added to the store's folder."""
    return os.access(store, os.W_OK)


def run_records(store: Path, run: Path) -> Path:
    """Return the folder within the run `run` for the records of a read-only store. It may not exist yet."""
    return run / RUN_RECORDS / _name(store)


def user_records(store: Path) -> Path | None:
    """Return the folder in the user's cache for the verification of a read-only store; None if there is no cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # unset, or relative, which the specification says to ignore
        cache = os.path.expanduser("~/.cache")
    return Path(cache) / "opt_ds" / RUN_RECORDS / _name(store) if os.path.isabs(cache) else None


def record_folder(store: Path, run: Path | None) -> Path | None:
    """Return where records of this store are written; None if it is read-only and there is no run."""
    if is_writable(store):
        return store
    return None if run is None else run_records(store, run)


def verification_folders(store: Path, run: Path | None) -> list[Path]:
    """Return where the verification of a store may be recorded, in order of preference."""
    if is_writable(store):
        return [store]
    folders = (None if run is None else run_records(store, run), user_records(store))
    return [folder for folder in folders if folder is not None]


def store_state(path: Path, description: StoreDescription) -> dict[str, Any]:
    """Return a value that changes whenever a file of the store does: sizes and times.

    It includes the time of the last status change, which is not preserved when a folder is copied.
    """
    folders = [path / description.tokenizer_folder, path / DVAE_FOLDER]
    files = [path / STORE_FILE, path / INDEX_FILE, *(path / shard.file for shard in description.shards)]
    files += [file for folder in folders for file in sorted(folder.glob("*"))]
    files += sorted(path.glob(CLUSTER_FILES))
    stats = {str(file.relative_to(path)): file.stat() for file in files if file.exists()}
    return {
        "fingerprint": description.fingerprint,
        "files": {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()},
    }


def is_recorded(folder: Path, state: dict[str, Any]) -> bool:
    """Return whether this folder records that a store in this state was verified."""
    try:
        return read_json_object(folder / VERIFIED_FILE, "") == state
    except UserError:  # never verified, or a damaged record: verify again
        return False


def _name(store: Path) -> str:
    place = store.resolve()
    return f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:12]}"
