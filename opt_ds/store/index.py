"""`index.h5`: data about all samples that a reader needs at once, and the position of each shard's datasets.

It is derived from the shards and can be rebuilt. With it, a store of a million samples opens in a fraction of a second.
It is memory-mapped, so pages are loaded as they are used. It is valid for one fingerprint, stored as an attribute.

Shape letters: N samples, S shards, M modalities of the store.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.files import atomic_file
from opt_ds.store.foreign import is_inside
from opt_ds.store.hdf5 import open_hdf5
from opt_ds.store.mapped import MappedFile
from opt_ds.store.schema import BUILT_IN, MISSING, StoreDescription, tail_shape

INDEX_FILE = "index.h5"
NOT_MAPPABLE, ABSENT = -1, -2  # in `layout`: compressed, so that HDF5 must read it; not in the shard


@dataclass(frozen=True)
class StoreIndex:
    """Arrays over all samples, rows and shards."""

    rows: np.ndarray  # int64 [N, M], global
    groups: np.ndarray  # int64 [N]
    splits: np.ndarray  # uint8 [N]
    by_split: np.ndarray  # int64 [N], samples sorted by split, ascending within each
    subsets: np.ndarray  # int64 [splits, 2**M], number of samples by their modalities: bit m is column m of `rows`
    lengths: dict[str, np.ndarray]  # items of each row by modality, int32 [rows of the modality]
    layout: np.ndarray  # int64 [S, datasets of the store, 2]: byte offset or a constant above; first dimension

    @property
    def text_lengths(self) -> np.ndarray:
        """Number of tokens of each text row, int32."""
        return self.lengths["text"]

    @property
    def region_counts(self) -> np.ndarray:
        """Number of regions of each image row, int32."""
        return self.lengths["image"]

    @property
    def frame_counts(self) -> np.ndarray:
        """Number of frames of each audio row, int32."""
        return self.lengths["audio"]

    def datasets(self) -> dict[str, np.ndarray]:
        """Return the datasets of `index.h5` in their order."""
        lengths = {_lengths_name(modality): array for modality, array in self.lengths.items()}
        arrays = {name: getattr(self, name) for name in _FIRST_FIELDS}
        return {**arrays, **lengths, "layout": self.layout}


_FIRST_FIELDS = ("rows", "groups", "splits", "by_split", "subsets")


def _lengths_name(modality: str) -> str:
    """Return the name of the dataset of `index.h5` that holds the lengths of a modality's rows."""
    return BUILT_IN[modality].lengths if modality in BUILT_IN else f"{modality}_lengths"


class ShardFile:
    """One open shard. `array(name)` is a read-only view of the file, or an h5py dataset if it is compressed."""

    def __init__(self, path: Path, layout: np.ndarray | None = None, description: StoreDescription | None = None) -> None:
        """Open a shard.

        `layout` is its row of the index; it requires the description of the store. Without it the HDF5 metadata are
        read.
        """
        self._arrays: dict[str, np.ndarray | h5py.Dataset] = {}
        self._offsets: dict[str, int] = {}
        self._bounds: dict[str, memoryview] = {}
        self._path = path
        self._mapped = MappedFile(path)
        if layout is None or description is None or (layout[:, 0] == NOT_MAPPABLE).any():
            self._open(path)
            return
        for (name, dtype), (offset, count) in zip(description.datasets.items(), layout.tolist(), strict=True):
            if offset == ABSENT:
                continue
            shape = (count, *tail_shape(name, description.dims, description.further))
            self._add(name, dtype, shape, offset)

    def check_size(self) -> None:
        """Raise RunError if the file has become shorter since it was opened."""
        self._mapped.check_size()

    def _open(self, path: Path) -> None:
        file = open_hdf5(path)
        keep_open = False
        for group_name, group in file.items():
            if not isinstance(group, h5py.Group):
                raise UserError(f"{path}: {group_name}: unknown dataset: prepare the store again")
            for dataset_name, dataset in group.items():
                if not isinstance(dataset, h5py.Dataset):
                    raise UserError(f"{path}: {group_name}/{dataset_name}: unknown group: prepare the store again")
                name, offset = f"{group_name}/{dataset_name}", dataset.id.get_offset()
                if dataset.size == 0 or offset is not None:
                    self._add(name, dataset.dtype, dataset.shape, offset or 0)
                else:
                    self._arrays[name], keep_open = dataset, True
        if not keep_open:
            file.close()

    def _add(self, name: str, dtype: str | np.dtype, shape: tuple[int, ...], offset: int) -> None:
        if 0 in shape:
            self._arrays[name] = np.zeros(shape, dtype)
            return
        if offset < 0 or min(shape) < 0 or offset + math.prod(shape) * np.dtype(dtype).itemsize > self._mapped.size:
            raise UserError(f"{self._path}: {name} is not within the file: remove {INDEX_FILE}, or prepare the store again")
        self._arrays[name], self._offsets[name] = self._mapped.array(str(np.dtype(dtype)), shape, offset), offset

    def layout(self, datasets: Iterable[str]) -> np.ndarray:
        """Return this shard's row of the index's `layout`, for the datasets of the store."""
        rows = []
        for name in datasets:
            array = self._arrays.get(name)
            if array is None:
                rows.append((ABSENT, 0))
            else:
                empty = array.size == 0
                rows.append((0 if empty else self._offsets.get(name, NOT_MAPPABLE), len(array)))
        return np.array(rows, "int64")

    def array(self, name: str) -> np.ndarray | h5py.Dataset:
        """Return dataset `name`. Raise KeyError if the shard does not have it."""
        return self._arrays[name]

    def names(self) -> list[str]:
        """Return the names of the datasets, such as "text/tokens"."""
        return list(self._arrays)

    def item(self, name: str, offsets: str, index: int) -> np.ndarray:
        """Return item `index` of a ragged dataset with these offsets."""
        return self._arrays[name][self.bounds(offsets, index)]

    def bounds(self, offsets: str, index: int) -> slice:
        """Return the rows of item `index` of the ragged datasets with these offsets."""
        try:
            bounds = self._bounds[offsets]
        except KeyError:
            # A memoryview returns Python integers, several times faster than an array returns NumPy's.
            bounds = self._bounds[offsets] = np.asarray(self._arrays[offsets][:]).data
        return slice(bounds[index], bounds[index + 1])

    def will_need(self, name: str, start: int, stop: int) -> int:
        """Ask the system to read rows start … stop − 1 of a dataset from disk.

        Return their size in bytes (0 if compressed).
        """
        array, offset = self._arrays[name], self._offsets.get(name)
        if offset is None:
            return 0
        size = array.nbytes // len(array)
        self._mapped.will_need(offset + start * size, offset + stop * size)
        return (stop - start) * size

    def release_pages(self) -> None:
        """Remove the pages read so far from this process's memory.

        They stay in the page cache, and views stay valid.
        """
        self._mapped.release()


def build_index(path: Path, description: StoreDescription) -> StoreIndex:
    """Build the index of the shards in memory."""
    modalities, datasets = description.modalities, description.datasets
    rows, groups, splits, layout = [], [], [], []
    lengths: dict[str, list[np.ndarray]] = {modality: [] for modality in modalities}
    base = np.zeros(len(modalities), "int64")
    for shard in description.shards:
        file = ShardFile(path / shard.file)
        local = np.asarray(file.array("samples/rows")[:])
        rows.append(np.where(local == MISSING, MISSING, local + base))
        groups.append(np.asarray(file.array("samples/group")[:]))
        splits.append(np.asarray(file.array("samples/split")[:]))
        for modality, parts in lengths.items():
            parts.append(np.diff(file.array(f"{modality}/offsets")[:]).astype("int32"))
        layout.append(file.layout(datasets)[None])
        base += [shard.num_rows(modality) for modality in modalities]
    all_rows = _join(rows, np.zeros((0, len(modalities)), "int64"))
    all_splits = _join(splits, np.zeros(0, "uint8"))
    return StoreIndex(
        rows=all_rows,
        groups=_join(groups, np.zeros(0, "int64")),
        splits=all_splits,
        by_split=np.argsort(all_splits, kind="stable").astype("int64"),
        subsets=count_subsets(all_rows, all_splits, len(description.split_names)),
        lengths={modality: _join(parts, np.zeros(0, "int32")) for modality, parts in lengths.items()},
        layout=_join(layout, np.zeros((0, len(datasets), 2), "int64")),
    )


def count_subsets(rows: np.ndarray, splits: np.ndarray, num_splits: int) -> np.ndarray:
    """Return the number of samples by split and modalities, int64 [splits, 2**M]; see `StoreIndex.subsets`."""
    subsets = 1 << rows.shape[1]
    subset = (rows != MISSING) @ (1 << np.arange(rows.shape[1]))
    counts = np.bincount(splits.astype("int64") * subsets + subset, minlength=num_splits * subsets)
    return counts.reshape(num_splits, subsets)


def write_index(path: Path, description: StoreDescription, folder: Path | None = None) -> None:
    """Write the `index.h5` of a store with this description, into its folder or into `folder`, atomically."""
    index = build_index(path, description)
    with (
        atomic_file((folder or path) / INDEX_FILE) as temporary,
        h5py.File(temporary, "w", libver=("v108", "v110"), alignment_threshold=1, alignment_interval=64) as file,
    ):
        file.attrs["fingerprint"] = description.fingerprint
        for name, array in index.datasets().items():
            file.create_dataset(name, data=array, track_times=False)


def read_index(path: Path, description: StoreDescription) -> StoreIndex | None:
    """Map `path/index.h5`. Return None if it is missing or does not match the description's fingerprint and shapes.

    The values are compared with the shards when the store is verified (`store.verify`).
    """
    file_path = path / INDEX_FILE
    if not is_inside(path, file_path):
        raise UserError(f"{file_path}: leads out of {path}: remove it")
    if not file_path.is_file():
        return None
    expected = _expected(description)
    try:
        with open_hdf5(file_path) as file:
            if file.attrs.get("fingerprint") != description.fingerprint:
                return None
            places = {name: (file[name].dtype, file[name].shape, file[name].id.get_offset()) for name in expected}
    except (UserError, OSError, KeyError, AttributeError, TypeError, ValueError):  # a damaged index can be rebuilt
        return None
    if {name: (str(dtype), shape) for name, (dtype, shape, _) in places.items()} != expected:
        return None
    mapped = MappedFile(file_path)
    arrays = {}
    for name, (dtype, shape, offset) in places.items():
        if offset is None and 0 not in shape:  # compressed, which this package never writes
            return None
        arrays[name] = np.zeros(shape, dtype) if 0 in shape else mapped.array(str(dtype), shape, offset)
    lengths = {modality: arrays.pop(_lengths_name(modality)) for modality in description.modalities}
    return StoreIndex(**arrays, lengths=lengths)


def _expected(description: StoreDescription) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the expected dtype and shape of each dataset of `index.h5`."""
    modalities, shards = description.modalities, description.shards
    samples = sum(shard.num_samples for shard in shards)
    lengths = {_lengths_name(modality): ("int32", (description.num_rows(modality),)) for modality in modalities}
    return {
        "rows": ("int64", (samples, len(modalities))),
        "groups": ("int64", (samples,)),
        "splits": ("uint8", (samples,)),
        "by_split": ("int64", (samples,)),
        "subsets": ("int64", (len(description.split_names), 1 << len(modalities))),
        **lengths,
        "layout": ("int64", (len(shards), len(description.datasets), 2)),
    }


def _join(parts: Sequence[np.ndarray], empty: np.ndarray) -> np.ndarray:
    joined = np.concatenate(parts) if parts else empty
    joined.flags.writeable = False
    return joined
