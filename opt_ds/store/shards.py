"""Files of shards: join items to the arrays of a shard, write them as HDF5, and describe the file."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from opt_ds.store.files import file_sha256
from opt_ds.store.further import FurtherCounts, FurtherModality
from opt_ds.store.schema import DATASETS, MODALITIES, ShardDescription

# Alignment also aligns the reader's maps. NumPy and torch are faster on aligned addresses.
ALIGNMENT_BYTES = 64


def write_datasets(
    path: Path, arrays: dict[str, np.ndarray], *, compression: str | None, datasets: Mapping[str, str] = DATASETS
) -> None:
    """Write the arrays of a shard as HDF5: contiguous, aligned, in the order of `datasets`, without time stamps.

    Equal input produces equal bytes. `datasets` are those of the store, see `datasets_of`.
    """
    assert arrays.keys() <= datasets.keys(), f"no datasets of the store: {arrays.keys() - datasets.keys()}"
    with h5py.File(
        path, "w", libver=("v108", "v110"), alignment_threshold=1, alignment_interval=ALIGNMENT_BYTES
    ) as shard:
        for name in datasets:
            if name not in arrays:
                continue
            array = arrays[name]
            # HDF5 cannot chunk, and therefore not compress, datasets without elements.
            options = {"compression": compression, "shuffle": True} if compression and array.size else {}
            shard.create_dataset(name, data=array, track_times=False, **options)


def describe_shard(file: Path, arrays: dict[str, np.ndarray], further: Iterable[str] = ()) -> ShardDescription:
    """Return the size, checksum and lengths of a shard file that contains these arrays.

    `further` are the names of the store's further modalities, in their order.
    """
    counts = {
        name: FurtherCounts(rows=len(arrays[f"{name}/offsets"]) - 1, items=len(arrays[f"{name}/features"])) for name in further
    }
    assert arrays["samples/rows"].shape[1] == len(MODALITIES) + len(counts), "samples/rows has a column per modality"
    return ShardDescription(
        file=file.name,
        bytes=file.stat().st_size,
        sha256=file_sha256(file),
        num_samples=len(arrays["samples/rows"]),
        num_texts=len(arrays["text/offsets"]) - 1,
        num_images=len(arrays["image/offsets"]) - 1,
        num_audios=len(arrays["audio/offsets"]) - 1,
        num_tokens=len(arrays["text/tokens"]),
        num_regions=len(arrays["image/features"]),
        num_frames=len(arrays["audio/features"]),
        further=counts,
    )


def join_columns(name: str, modality: FurtherModality, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the datasets of a further modality from its rows, in the dtypes of the store."""
    arrays = {f"{name}/offsets": join_items([row["features"] for row in rows], (0, modality.feature_dim))[1]}
    for column, stored in modality.columns.items():
        joined, _ = join_items([row[column] for row in rows], (0, *stored.width))
        arrays[f"{name}/{column}"] = joined.astype(stored.dtype, copy=False)
    return arrays


def join_items(items: Sequence[np.ndarray], empty_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated items and their int64 offsets [n + 1]; without items, zeros of `empty_shape`."""
    offsets = np.zeros(len(items) + 1, "int64")
    np.cumsum([len(item) for item in items], out=offsets[1:])
    return (np.concatenate(items) if items else np.zeros(empty_shape)), offsets


def join_strings(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated UTF-8 bytes of the strings, uint8, and their int64 offsets [n + 1]."""
    return join_items([np.frombuffer(string.encode("utf-8"), "uint8") for string in strings], (0,))
