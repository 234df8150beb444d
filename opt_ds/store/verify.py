"""Is a store fit for use? Asked by everything that reads features, once for each change of its files.

What is compared: every hash that the store keeps (shards, tokenizer, dVAE), the structure and bounds of all datasets, and what
is derived from the shards (statistics, `index.h5`). `opt-ds inspect` applies the same rules and lists every fault.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.contents import (
    description_problems,
    index_problems,
    shard_problems,
    statistics_problems,
    tokenizer_problems,
)
from opt_ds.store.dvae import dvae_problem
from opt_ds.store.files import file_sha256, write_json
from opt_ds.store.foreign import read_json_object
from opt_ds.store.index import INDEX_FILE, ShardFile, read_index, write_index
from opt_ds.store.reader import FeatureStore, check_sizes
from opt_ds.store.schema import DVAE_FOLDER, STORE_FILE, StoreDescription, load_description

VERIFIED_FILE = "verified.json"


def open_store(path: str | Path, *, with_dvae: bool = True) -> FeatureStore:
    """Verify a store, unless that was done since its files last changed, and open it. UserError if it must not be used."""
    verify_store(path, with_dvae=with_dvae)
    return FeatureStore(path)


def verify_store(path: str | Path, *, with_dvae: bool = True) -> None:
    """Raise UserError, naming shard and dataset, unless the store is whole and holds what `store.json` says.

    Presence and sizes are checked always, all else once: `verified.json` beside `store.json` remembers the size and the times
    of every file. Without permission to write there, every call checks. A store without a usable `index.h5` gets one.

    Args:
        path: The store's folder.
        with_dvae: Check the dVAE too; False for commands that are about to replace it.
    """
    path = Path(path)
    description = load_description(path)
    check_sizes(path, description)
    if _remembered(path) == _state(path, description) and read_index(path, description) is not None:
        return
    _refuse(path, description_problems(description) + tokenizer_problems(path, description))
    if with_dvae and (problem := dvae_problem(path, description)) is not None:
        raise UserError(problem)
    _verify_shards(path, description)
    _refuse(path, statistics_problems(path, description))
    if os.access(path, os.W_OK) and read_index(path, description) is None:
        write_index(path, description)  # only over verified shards: the index of damaged ones would outlive their repair
    else:
        _refuse(path, index_problems(path, description), remedy="")
    if with_dvae and os.access(path, os.W_OK):
        write_json(path / VERIFIED_FILE, _state(path, description))


def _verify_shards(path: Path, description: StoreDescription) -> None:
    counts = np.zeros(len(description.split_names), "int64")
    for shard in description.shards:
        if file_sha256(path / shard.file) != shard.sha256:
            raise UserError(f"{path / shard.file}: checksum differs from store.json's: prepare the store again")
        _refuse(path, shard_problems(path, shard, description))
        counts += np.bincount(ShardFile(path / shard.file).array("samples/split")[:], minlength=len(counts))
    if dict(zip(description.split_names, counts.tolist(), strict=True)) != description.split_counts:
        _refuse(path, [f"{STORE_FILE}: split_counts differ from samples/split"])


def _refuse(path: Path, problems: list[str], remedy: str = ": prepare the store again") -> None:
    if problems:
        more = f" (and {len(problems) - 1} more, which opt-ds inspect lists)" if len(problems) > 1 else ""
        raise UserError(f"{path / problems[0]}{more}{remedy}")


def _remembered(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path / VERIFIED_FILE, "")
    except UserError:  # never verified, or a broken note: verify again
        return None


def _state(path: Path, description: StoreDescription) -> dict[str, Any]:
    """Return what changes when a file does. The time of the last change of status cannot be copied along with a folder."""
    folders = [path / description.tokenizer_folder, path / DVAE_FOLDER]
    files = [path / STORE_FILE, path / INDEX_FILE, *(path / shard.file for shard in description.shards)]
    files += [file for folder in folders for file in sorted(folder.glob("*"))]
    stats = {str(file.relative_to(path)): file.stat() for file in files if file.exists()}
    return {
        "fingerprint": description.fingerprint,
        "files": {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()},
    }
