"""Verify that a store is fit for use. Everything that reads features calls this, but files are checked once per change.

The check covers every hash that the store keeps (shards, tokenizer, dVAE), the structure and bounds of all datasets,
and data derived from the shards (statistics, `index.h5`). `opt-ds inspect` applies the same rules and lists every
fault.
"""

from pathlib import Path

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.clusters import clusters_problem
from opt_ds.store.contents import (
    description_problems,
    index_problems,
    shard_problems,
    statistics_problems,
    tokenizer_problems,
)
from opt_ds.store.dvae import dvae_problem
from opt_ds.store.files import file_sha256, write_json
from opt_ds.store.index import ShardFile, read_index, write_index
from opt_ds.store.reader import FeatureStore, check_sizes
from opt_ds.store.records import VERIFIED_FILE, is_recorded, is_writable, record_folder, store_state, verification_folders
from opt_ds.store.schema import STORE_FILE, StoreDescription, load_description

__all__ = ["VERIFIED_FILE", "open_store", "verify_store"]


def open_store(path: str | Path, *, with_dvae: bool = True) -> FeatureStore:
    """Verify a store, unless that was done since its files last changed, and open it.

    Raise UserError if it must not be used.
    """
    verify_store(path, with_dvae=with_dvae)
    return FeatureStore(path)


def verify_store(path: str | Path, *, with_dvae: bool = True, run: Path | None = None) -> None:
    """Raise UserError, naming shard and dataset, unless the store is complete and its content matches `store.json`.

    Presence and sizes are always checked. Everything else is checked once: `verified.json` next to `store.json` records
    the size and times of every file. A store without a usable `index.h5` gets one. For a read-only store both are
    written to the folder of the run. Outside a run, `verified.json` is written to the user's cache. If neither is
    writable, every call repeats the checks.

    Args:
        path: The store's folder.
        with_dvae: Check the dVAE and the clusters of region labels too. False for commands that may replace them.
        run: The output directory of the run that reads the store.
    """
    path = Path(path)
    description = load_description(path)
    check_sizes(path, description)
    if _is_verified(path, description, run):
        return
    _refuse(path, description_problems(description) + tokenizer_problems(path, description))
    if with_dvae and (problem := dvae_problem(path, description)) is not None:
        raise UserError(problem)
    if with_dvae and (problem := clusters_problem(path, description.extractors)) is not None:
        raise UserError(problem)
    _verify_shards(path, description)
    _refuse(path, statistics_problems(path, description))
    if read_index(path, description) is not None:
        _refuse(path, index_problems(path, description), remedy="")
    elif is_writable(path):
        write_index(path, description)  # after verification: an index of damaged shards would outlive their repair
    if with_dvae:
        _record(path, description, run)


def _is_verified(path: Path, description: StoreDescription, run: Path | None) -> bool:
    state = store_state(path, description)
    if is_recorded(path, state) and (read_index(path, description) is not None or not is_writable(path)):
        return True
    return not is_writable(path) and any(is_recorded(folder, state) for folder in verification_folders(path, run))


def _record(path: Path, description: StoreDescription, run: Path | None) -> None:
    """Record the verification in the first writable place.

    If the run's folder is not writable, the run's lock reports it.
    """
    for folder in verification_folders(path, run):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if read_index(path, description) is None and folder == record_folder(path, run):
                write_index(path, description, folder)
            write_json(folder / VERIFIED_FILE, store_state(path, description))
            return
        except OSError:
            if folder == path:
                raise


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
