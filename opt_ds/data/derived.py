"""Cache of arrays that a step plan derives from a complete store.

Each array is computed once, stored in a file with the store's records, and memory-mapped by every rank.

A file is valid for one store fingerprint and one key (what the array depends on besides the store). A file that was
modified or damaged is computed again. Writing a file removes those of the store's earlier contents.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.files import atomic_file, write_json
from opt_ds.store.foreign import read_json_object
from opt_ds.store.reader import FeatureStore

DERIVED_FOLDER = "derived"
_LOG = logging.getLogger(__name__)
VERSION = 1  # of the arrays' definition; files of other versions are not used


def cached_array(store: FeatureStore, name: str, key: list[Any], make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array that `make` returns, from its file if there is one. Otherwise compute and store it.

    Args:
        store: The store that the array is derived from.
        name: Name of the array, part of the file's name.
        key: What the array depends on besides the store's contents; must be JSON-serialisable.
        make: Computes the array. If no file can be written, its result is returned as it is.

    Returns:
        The array, memory-mapped read-only if it has a file.
    """
    folder = store.records
    if folder is None:
        return make()
    content_key = json.dumps([VERSION, store.fingerprint, name, key])
    path = folder / DERIVED_FOLDER / f"{name}-{hashlib.sha256(content_key.encode()).hexdigest()[:24]}.npy"
    array = _read(path, content_key)
    if array is None:
        made = make()
        try:
            _write(path, content_key, made)
            _remove_outdated(path.parent, store.fingerprint)
        except OSError:  # a full disk or a folder without permission: the array stays in memory
            return made
        array = _read(path, content_key)
        return made if array is None else array
    return array


def _read(path: Path, content_key: str) -> np.ndarray | None:
    try:
        if read_json_object(path.with_suffix(".json"), "") != _note(path, content_key):
            return None
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (UserError, OSError, ValueError):  # missing or damaged
        return None


def _write(path: Path, content_key: str, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
    write_json(path.with_suffix(".json"), _note(path, content_key))


def _remove_outdated(folder: Path, fingerprint: str) -> None:
    """Remove the arrays with another fingerprint, because the folder belongs to one store.

    Existing mappings stay valid.
    """
    removed = 0
    for note in folder.glob("*.json"):
        try:
            of = json.loads(read_json_object(note, "")["identity"])[1]
        except (UserError, KeyError, TypeError, ValueError, IndexError):  # damaged, or not written by this module
            continue
        if isinstance(of, str) and of != fingerprint:
            note.with_suffix(".npy").unlink(missing_ok=True)
            note.unlink(missing_ok=True)
            removed += 1
    if removed:
        _LOG.debug("%s: removed %d arrays of the store's earlier contents", folder, removed)


def _note(path: Path, content_key: str) -> dict[str, Any]:
    stat = path.stat()
    # Existing files name the key so.
    return {"identity": content_key, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
