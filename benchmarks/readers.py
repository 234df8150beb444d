"""The readers that `benchmarks/reader.py` compares. Each reads the same samples from its own format.

A reader has a `name`, its `files`, and `samples(order)`, which yields the samples with these indices. If it has
`fill(order, batch)`, that reads them straight into the arrays of a batch. If it has `reopen()`, that unmaps pages of
the process, because a mapped page cannot be dropped from the system's cache.
"""

import bisect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.store.reader import FeatureStore

REGIONS, REGION_DIM, FRAMES, FRAME_DIM = 36, 2048, 65, 768
READ_AHEAD = 64 * 2**20
Sample = tuple[np.ndarray, np.ndarray]  # regions [36, 2048], frames [65, 768], float16


def all_samples(source: Path) -> Iterator[Sample]:
    store = FeatureStore(source)
    for _, image, audio in store.rows.tolist():
        yield store.region_features(image), store.frames(audio)


class Ours:
    """`FeatureStore` without changes."""

    name = "opt_ds"
    _ahead = False

    def __init__(self, folder: Path, source: Path) -> None:
        self.files = sorted(source.glob("shard-*.h5"))
        self._store = FeatureStore(source)

    def samples(self, order: np.ndarray) -> Iterator[Sample]:
        store, rows, asked, pending, at = self._store, self._store.rows[order].tolist(), 0, [], 0
        for place, (_, image, audio) in enumerate(rows):
            while self._ahead and at < len(rows) and asked < READ_AHEAD:
                pending.append(store.read_ahead("image", rows[at][1]) + store.read_ahead("audio", rows[at][2]))
                asked, at = asked + pending[-1], at + 1
            yield store.region_features(image), store.frames(audio)
            if self._ahead:
                asked -= pending[place]

    def reopen(self) -> None:
        """Unmap the process's pages."""
        self._store.release_pages()


class OursAhead(Ours):
    """Requests 64 MiB ahead in the known order, as the loader does in a separate thread, here in the same one."""

    name = "opt_ds, reading ahead"
    _ahead = True


class Hdf5:
    """The same shards read by h5py, whose files and datasets stay open. A sample's offsets are in memory.

    Regions and frames are contiguous ranges of rows, as for opt_ds. A view slices the dataset, which is h5py's fastest
    way to a new array. A batch is filled by h5py's low-level read straight into its arrays, without a copy between. The
    descriptions of the memory (type and shapes) are kept too: to make them for each read takes half of the time.
    """

    name = "h5py, datasets held open"

    def __init__(self, folder: Path, source: Path) -> None:
        import h5py

        self.files = sorted(source.glob("shard-*.h5"))
        self._shards = [h5py.File(file, "r") for file in self.files]
        columns = "image/offsets", "audio/offsets"
        self._offsets = [tuple(shard[column][:].tolist() for column in columns) for shard in self._shards]
        self._datasets = [(shard["image/features"], shard["audio/features"]) for shard in self._shards]
        self._spaces = [tuple(dataset.id.get_space() for dataset in pair) for pair in self._datasets]
        self._starts = np.cumsum([0, *(len(shard["samples/rows"]) for shard in self._shards)]).tolist()
        self._type = h5py.h5t.py_create(np.dtype(np.float16))
        self._space_of = cache(h5py.h5s.create_simple)

    def samples(self, order: np.ndarray) -> Iterator[Sample]:
        for number, (image, audio) in self._places(order):
            regions, frames = self._datasets[number]
            yield regions[image], frames[audio]

    def fill(self, order: np.ndarray, batch: tuple[np.ndarray, ...]) -> None:
        """Read the samples into the first rows of the batch's arrays."""
        at = [0, 0]
        for number, ranges in self._places(order):
            for which, (rows, array) in enumerate(zip(ranges, batch, strict=True)):
                count, width = rows.stop - rows.start, array.shape[1]
                space = self._spaces[number][which]
                space.select_hyperslab((rows.start, 0), (count, width))
                target = array[at[which] : at[which] + count]
                self._datasets[number][which].id.read(self._space_of((count, width)), space, target, self._type)
                at[which] += count

    def _places(self, order: np.ndarray) -> Iterator[tuple[int, tuple[slice, slice]]]:
        """Yield the shard of each sample, and its rows of regions and frames."""
        for index in order.tolist():
            number = bisect.bisect_right(self._starts, index) - 1
            (image, audio), local = self._offsets[number], index - self._starts[number]
            yield number, (slice(image[local], image[local + 1]), slice(audio[local], audio[local + 1]))


class Hdf5Lookups(Hdf5):
    """The same, but datasets are looked up by name for each sample, and a batch is concatenated from its samples."""

    name = "h5py, datasets looked up per sample"
    fill = None  # type: ignore[assignment]

    def samples(self, order: np.ndarray) -> Iterator[Sample]:
        for number, (image, audio) in self._places(order):
            shard = self._shards[number]
            yield shard["image/features"][image], shard["audio/features"][audio]


class Lmdb:
    """One value per sample, regions and frames concatenated, read in place (buffers=True)."""

    name = "LMDB"

    def __init__(self, folder: Path, source: Path) -> None:
        import lmdb

        path = folder / "lmdb"
        if not path.is_dir():
            with lmdb.open(str(path), map_size=1 << 36) as environment, environment.begin(write=True) as writing:
                for index, (regions, frames) in enumerate(all_samples(source)):
                    writing.put(b"%08d" % index, regions.tobytes() + frames.tobytes())
        self.files = [path / "data.mdb"]
        self._path, self._module = path, lmdb
        self._open()

    def _open(self) -> None:
        self._environment = self._module.open(str(self._path), readonly=True, lock=False)
        self._reading = self._environment.begin(buffers=True)

    def samples(self, order: np.ndarray) -> Iterator[Sample]:
        for index in order.tolist():
            values = np.frombuffer(self._reading.get(b"%08d" % index) or b"", np.float16)
            cut = REGIONS * REGION_DIM
            yield values[:cut].reshape(REGIONS, REGION_DIM), values[cut:].reshape(FRAMES, FRAME_DIM)

    def reopen(self) -> None:
        self._reading.abort()
        self._environment.close()
        self._open()


class WebDataset:
    """Tar files of raw arrays, in their order (it has no random access), decoded by np.frombuffer."""

    name = "WebDataset (sequential)"

    def __init__(self, folder: Path, source: Path) -> None:
        import webdataset

        path = folder / "webdataset"
        if not path.is_dir():
            path.mkdir()
            with webdataset.ShardWriter(str(path / "%05d.tar"), maxcount=500, verbose=0) as writing:
                for index, (regions, frames) in enumerate(all_samples(source)):
                    writing.write({"__key__": f"{index:08d}", "regions": regions.tobytes(), "frames": frames.tobytes()})
        self.files = sorted(path.glob("*.tar"))
        self._module = webdataset

    def samples(self, order: np.ndarray) -> Iterator[Sample]:
        reader = iter(self._module.WebDataset([str(file) for file in self.files], shardshuffle=False))
        for _ in order:
            sample = next(reader)
            yield (np.frombuffer(sample["regions"], np.float16).reshape(REGIONS, REGION_DIM),
                   np.frombuffer(sample["frames"], np.float16).reshape(FRAMES, FRAME_DIM))  # fmt: skip


class Mosaic:
    """Mosaic's MDS shards, local, by index."""

    name = "Mosaic streaming"

    def __init__(self, folder: Path, source: Path) -> None:
        import streaming

        path = folder / "mosaic"
        if not path.is_dir():
            columns = {
                "regions": f"ndarray:float16:{REGIONS},{REGION_DIM}",
                "frames": f"ndarray:float16:{FRAMES},{FRAME_DIM}",
            }
            with streaming.MDSWriter(out=str(path), columns=columns) as writing:
                for regions, frames in all_samples(source):
                    writing.write({"regions": regions, "frames": frames})
        self.files = sorted(path.glob("*.mds"))
        streaming.base.util.clean_stale_shared_memory()
        self._dataset = streaming.StreamingDataset(local=str(path), shuffle=False, batch_size=1)

    def samples(self, order: np.ndarray) -> Iterator[Sample]:
        for index in order.tolist():
            sample = self._dataset[index]
            yield sample["regions"], sample["frames"]


READERS: tuple[Any, ...] = (Ours, OursAhead, Hdf5, Hdf5Lookups, Lmdb, WebDataset, Mosaic)
