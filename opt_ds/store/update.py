"""Adds image codes to a finished store. A kill at any moment leaves the old store or the new one, no mixture."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.files import atomic_file, remove_leftovers, write_json
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import CODES_PER_IMAGE, STORE_FILE, StoreDescription, load_description
from opt_ds.store.writer import describe_shard, write_datasets

_REVISION = re.compile(r"^(shard-\d+)(?:-r(\d+))?\.h5$")


def set_codes(store_path: str | Path, codes_nc: np.ndarray, extractor: dict[str, Any]) -> StoreDescription:
    """Add or replace `image/codes` and return the new description.

    `codes_nc`: [image rows, 64] in global row order. `extractor` is recorded under extractors.codes; its "num_codes" is
    the codebook's size. Shards are rewritten under new names, then `store.json` is replaced, then the old files go.
    Raises UserError if the shape or a value is wrong.
    """
    path = Path(store_path)
    store = FeatureStore(path)
    description = store.description
    num_images = sum(shard.num_images for shard in description.shards)
    num_codes = int(extractor["num_codes"])
    if codes_nc.shape != (num_images, CODES_PER_IMAGE):
        raise UserError(
            f"{path}: codes of shape {list(codes_nc.shape)}, the store needs {[num_images, CODES_PER_IMAGE]}"
        )
    if codes_nc.size and not 0 <= int(codes_nc.min()) <= int(codes_nc.max()) < num_codes:
        raise UserError(f"{path}: codes {codes_nc.min()}..{codes_nc.max()} do not fit a codebook of {num_codes}")
    _remove_unlisted(path, description)
    shards, start = [], 0
    for index, old in enumerate(description.shards):
        file = store.shard(index)
        arrays = {name: np.asarray(file.array(name)[:]) for name in file.names()}
        arrays["image/codes"] = codes_nc[start : start + old.num_images].astype("uint16")
        start += old.num_images
        target = path / _next_name(old.file)
        with atomic_file(target) as temporary:
            write_datasets(temporary, arrays, compression=description.compression)
        shards.append(describe_shard(target, arrays))
    updated = description.model_copy(
        update={
            "shards": shards,
            "has_codes": True,
            "dims": description.dims.model_copy(update={"num_codes": num_codes}),
            "extractors": {**description.extractors, "codes": extractor},
        }
    ).with_fingerprint()
    write_json(path / STORE_FILE, updated.model_dump(mode="json"))
    _remove_unlisted(path, updated)
    return load_description(path)


def _next_name(file: str) -> str:
    match = _REVISION.match(file)
    assert match is not None, f"{file} is not a shard's name"
    stem, revision = match.groups()
    return f"{stem}-r{int(revision or 0) + 1}.h5"


def _remove_unlisted(path: Path, description: StoreDescription) -> None:
    """Remove shards that `store.json` does not list: left by an update killed before or after it replaced it."""
    for names in ("shard-*", STORE_FILE):
        remove_leftovers(path, names)
    listed = {shard.file for shard in description.shards}
    for file in path.glob("shard-*.h5"):
        if _REVISION.match(file.name) and file.name not in listed:
            file.unlink()
