"""Change a finished store in place.

If the process is killed, either the old or the new store remains, never a mixture.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.files import atomic_file, remove_leftovers, write_json
from opt_ds.store.index import INDEX_FILE, ShardFile, write_index
from opt_ds.store.reader import FeatureStore, check_contents
from opt_ds.store.schema import (
    CODES_PER_IMAGE,
    STORE_FILE,
    TOKENIZER_FOLDER,
    FurtherModality,
    StoreDescription,
    check_further,
    datasets_of,
    load_description,
)
from opt_ds.store.shards import describe_shard, write_datasets
from opt_ds.store.statistics import TRAIN_SPLIT, statistics_of, summed_datasets, train_sums
from opt_ds.store.verify import open_store

Arrays = dict[str, np.ndarray]

_REVISION = re.compile(r"^(shard-\d+)(?:-r(\d+))?\.h5$")
_TOKENIZER = re.compile(rf"^{TOKENIZER_FOLDER}(-r\d+)?$|^\.{TOKENIZER_FOLDER}(-r\d+)?\.\d+\.tmp$")


def rewrite_shards(
    store: FeatureStore,
    change: Callable[[int, Arrays], Arrays],
    fields: Callable[[], dict[str, Any]],
    *,
    new_statistics: bool = True,
    new_tokenizer: str = "",
    new_further: dict[str, FurtherModality] | None = None,
) -> StoreDescription:
    """Replace every shard by `change(index, its arrays)`.

    Shards are written under new names, then `store.json` is replaced, then the old files are removed. On an error the
    store is unchanged.

    Args:
        store: The store.
        change: Called with the index and the arrays of a shard; returns the new arrays.
        fields: Called after all shards are written; returns the other changes of `store.json`.
        new_statistics: Compute statistics and split counts again, because features or splits have changed.
        new_tokenizer: Name of a tokenizer folder that exists already and that `fields()` will set.
        new_further: The further modalities after the change; None: those of the store. samples/rows must have a column
            for each, in this order.

    Returns:
        The new description of the store.

    Raises:
        UserError: A shard is damaged.
    """
    path, description = store.path, store.description
    further = description.further if new_further is None else new_further
    check_further(further, str(path))
    remove_unlisted(path, description, new_tokenizer)
    shards, per_shard = [], []
    try:
        for index, old in enumerate(description.shards):
            check_contents(path, old)
            file = store.shard(index)
            arrays = change(index, {name: np.asarray(file.array(name)[:]) for name in file.names()})
            target = path / _next_name(old.file)
            with atomic_file(target) as temporary:
                write_datasets(temporary, arrays, compression=description.compression, datasets=datasets_of(further))
            shards.append(describe_shard(target, arrays, further))
            per_shard.append(arrays["samples/split"])
    except BaseException:
        remove_unlisted(path, description, new_tokenizer)
        raise
    updated = description.model_copy(update={"shards": shards, "further": further, **fields()})
    if new_statistics:
        updated = updated.model_copy(update=_counts_and_statistics(path, updated, per_shard))
    updated = updated.with_fingerprint()
    write_index(path, updated)
    write_json(path / STORE_FILE, updated.model_dump(mode="json"))
    remove_unlisted(path, updated)
    return load_description(path)


def set_codes(store_path: str | Path, codes_nc: np.ndarray, extractor: dict[str, Any]) -> StoreDescription:
    """Add or replace `image/codes` and return the new description.

    `codes_nc` is [image rows, 64] in global row order. `extractor` is recorded under extractors.codes; its "num_codes"
    is the size of the codebook. Raise UserError if the shape or a value is wrong.
    """
    path = Path(store_path)
    store = open_store(path, with_dvae=False)
    description = store.description
    num_images = sum(shard.num_images for shard in description.shards)
    num_codes = int(extractor["num_codes"])
    if codes_nc.shape != (num_images, CODES_PER_IMAGE):
        raise UserError(
            f"{path}: codes of shape {list(codes_nc.shape)}, the store needs {[num_images, CODES_PER_IMAGE]}"
        )
    if codes_nc.size and not 0 <= int(codes_nc.min()) <= int(codes_nc.max()) < num_codes:
        raise UserError(f"{path}: codes {codes_nc.min()}..{codes_nc.max()} do not fit a codebook of {num_codes}")
    ends = np.cumsum([shard.num_images for shard in description.shards])

    def change(index: int, arrays: Arrays) -> Arrays:
        start = ends[index] - description.shards[index].num_images
        return {**arrays, "image/codes": codes_nc[start : ends[index]].astype("uint16")}

    return rewrite_shards(
        store,
        change,
        lambda: {
            "has_codes": True,
            "dims": description.dims.model_copy(update={"num_codes": num_codes}),
            "extractors": {**description.extractors, "codes": extractor},
        },
        new_statistics=False,
    )


def _counts_and_statistics(path: Path, updated: StoreDescription, splits: list[np.ndarray]) -> dict[str, Any]:
    names = updated.split_names
    counts = np.sum([np.bincount(codes, minlength=len(names)) for codes in splits], axis=0, dtype=int)
    train = names.index(TRAIN_SPLIT) if TRAIN_SPLIT in names else None
    sums = []
    for shard in updated.shards:
        file = ShardFile(path / shard.file)
        arrays = {name: np.asarray(file.array(name)[:]) for name in summed_datasets(updated.further)}
        sums.append(train_sums(arrays, train, updated.further))
    return {
        "split_counts": dict(zip(names, counts.tolist(), strict=True)),
        "statistics": statistics_of(sums, updated.dims, updated.further),
    }


def _next_name(file: str) -> str:
    match = _REVISION.match(file)
    assert match is not None, f"{file} is not a shard's name"
    stem, revision = match.groups()
    return f"{stem}-r{int(revision or 0) + 1}.h5"


def remove_unlisted(path: Path, description: StoreDescription, new_tokenizer: str = "") -> None:
    """Remove shards and tokenizers that `store.json` does not name. They are left by updates that were killed."""
    kept = (description.tokenizer_folder, new_tokenizer)
    for names in ("shard-*", INDEX_FILE, STORE_FILE):
        remove_leftovers(path, names)
    for folder in path.iterdir():
        if _TOKENIZER.match(folder.name) and folder.is_dir() and folder.name not in kept:
            shutil.rmtree(folder)
    listed = {shard.file for shard in description.shards}
    for file in path.glob("shard-*.h5"):
        if _REVISION.match(file.name) and file.name not in listed:
            file.unlink()
