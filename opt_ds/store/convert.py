"""Copy a finished store with another compression: gzip for an archive, or contiguous for reading."""

import shutil
from pathlib import Path
from typing import Literal

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.files import atomic_folder, write_json
from opt_ds.store.index import INDEX_FILE, write_index
from opt_ds.store.reader import check_contents
from opt_ds.store.schema import STORE_FILE, StoreDescription, load_description
from opt_ds.store.shards import describe_shard, write_datasets
from opt_ds.store.verify import open_store

_OWN = {STORE_FILE, INDEX_FILE, "verified.json"}


def copy_store(source: Path, output: Path, compression: Literal["gzip"] | None) -> StoreDescription:
    """Write `output`, a store with the same content and the given compression, atomically."""
    if output.exists():
        raise UserError(f"{output}: it exists already: choose another --output or remove it")
    store = open_store(source)
    listed = {shard.file for shard in store.description.shards}
    with atomic_folder(output) as temporary:
        temporary.mkdir()
        for entry in sorted(source.iterdir()):
            if entry.name in listed | _OWN or entry.name.startswith("."):  # written below, or left by a killed process
                continue
            if entry.is_dir():
                shutil.copytree(entry, temporary / entry.name)
            else:
                shutil.copyfile(entry, temporary / entry.name)
        shards = []
        for index, shard in enumerate(store.description.shards):
            check_contents(source, shard)
            file = store.shard(index)
            arrays = {name: np.asarray(file.array(name)[:]) for name in file.names()}
            write_datasets(temporary / shard.file, arrays, compression=compression, datasets=store.description.datasets)
            shards.append(describe_shard(temporary / shard.file, arrays, store.description.further))
            store.release_pages()
        updated = store.description.model_copy(update={"shards": shards, "compression": compression}).with_fingerprint()
        write_index(temporary, updated)
        write_json(temporary / STORE_FILE, updated.model_dump(mode="json"))
    return load_description(output)
