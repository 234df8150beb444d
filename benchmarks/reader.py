"""Measure random reads of complete samples: opt_ds, h5py slices of the same files, LMDB, WebDataset and Mosaic
streaming.

    python benchmarks/reader.py [--samples 2000] [--repeats 7] [--folder FOLDER] [--output reader.json]

Every format holds the same samples, 36 regions of 2,048 and 65 frames of 768 float16: 0.25 MB. Two results are timed.
`view`: the arrays of each sample can be read (one value of each is read). `packed`: every byte is copied into the
arrays of a batch of 32, as in training. Warm: the repeats of all readers are interleaved, each in its own random order.
Cold: the files' pages are dropped by posix_fadvise(DONTNEED) before each repeat, and the fraction of pages that stayed
is measured. A sequential read of the same files, also dropped before, is measured too. WebDataset has no random access
and is read in the order of its tar files. WebDataset and Mosaic streaming are in benchmarks/requirements.txt. A reader
whose package is missing is omitted, and the script prints that.
"""

import argparse
import ctypes
import itertools
import json
import mmap
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import median_ratio  # noqa: E402
from opt_ds.store.files import write_json  # noqa: E402
from opt_ds.store.mapped import MappedFile  # noqa: E402
from opt_ds.store.reader import FeatureStore  # noqa: E402
from opt_ds.store.synthetic import write_synthetic_store  # noqa: E402

REGIONS, REGION_DIM, FRAMES, FRAME_DIM = 36, 2048, 65, 768
BATCH = 32
READ_AHEAD = 64 * 2**20
BLOCK = 8 * 2**20
Sample = tuple[np.ndarray, np.ndarray]  # regions [36, 2048], frames [65, 768], float16


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
        """Unmap the process's pages, because a mapped page cannot be dropped from the system's cache."""
        self._store.release_pages()


class OursAhead(Ours):
    """Requests 64 MiB ahead in the known order, as the loader does (there in a separate thread, here in the same one)."""

    name = "opt_ds, reading ahead"
    _ahead = True


class Hdf5Slices:
    """The same shards read by h5py: one dataset slice for regions, one for frames; offsets are read once."""

    name = "h5py slices"

    def __init__(self, folder: Path, source: Path) -> None:
        import h5py

        self.files = sorted(source.glob("shard-*.h5"))
        self._shards = [h5py.File(file, "r") for file in self.files]
        self._offsets = [(shard["image/offsets"][:], shard["audio/offsets"][:]) for shard in self._shards]
        self._starts = np.cumsum([0, *(len(shard["samples/rows"]) for shard in self._shards)])

    def samples(self, order: np.ndarray) -> Iterator[Sample]:
        for index in order.tolist():
            number = int(np.searchsorted(self._starts, index, "right")) - 1
            shard, (image, audio), local = self._shards[number], self._offsets[number], index - self._starts[number]
            regions = shard["image/features"][image[local] : image[local + 1]]
            yield regions, shard["audio/features"][audio[local] : audio[local + 1]]


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


def all_samples(source: Path) -> Iterator[Sample]:
    store = FeatureStore(source)
    for _, image, audio in store.rows.tolist():
        yield store.region_features(image), store.frames(audio)


def view(reader: Any, order: np.ndarray) -> None:
    total = 0.0
    for regions, frames in reader.samples(order):
        total += float(regions[0, 0]) + float(frames[0, 0])
    assert np.isfinite(total)


def packed(reader: Any, order: np.ndarray, batch: tuple[np.ndarray, ...]) -> None:
    """Read batch by batch: the arrays of its samples, then all of them concatenated."""
    regions_rv, frames_av = batch
    samples = reader.samples(order)
    while found := list(itertools.islice(samples, BATCH)):
        regions, frames = zip(*found, strict=True)
        np.concatenate(regions, out=regions_rv[: len(found) * REGIONS])
        np.concatenate(frames, out=frames_av[: len(found) * FRAMES])


def sequential(files: list[Path]) -> None:
    block = bytearray(BLOCK)
    for file in files:
        with open(file, "rb", buffering=0) as reading:
            while reading.readinto(block):
                pass


def drop(files: list[Path]) -> float:
    """Drop the files' pages from the system's cache and return the fraction that stayed."""
    pages = stayed = 0
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        mapped = MappedFile(file)
        count = -(-mapped.size // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * count)()
        address = mapped.bytes.__array_interface__["data"][0]
        if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(mapped.size), resident):
            raise OSError("mincore failed")
        pages, stayed = pages + count, stayed + sum(value & 1 for value in bytes(resident))
    return stayed / pages


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Return the wall-clock and processor seconds."""
    wall, busy = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - busy


def memory_rate() -> float:
    """Return the bytes per second that one thread copies between arrays larger than any cache, the median of 5."""
    source, target = np.ones(256 << 20, np.uint8), np.zeros(256 << 20, np.uint8)
    return len(source) / statistics.median(timed(lambda: np.copyto(target, source))[1] for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cold-repeats", type=int, default=5)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("/var/tmp/opt_ds-reader"),
        help="folder on a disk, not on a memory file system",
    )
    parser.add_argument("--output", type=Path, default=Path("reader.json"))
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    options = parser.parse_args()

    options.folder.mkdir(parents=True, exist_ok=True)
    source = options.folder / f"store-{options.samples}"
    if not (source / "store.json").is_file():
        write_synthetic_store(source, options.samples, regions=(REGIONS, REGIONS), frames=(FRAMES, FRAMES), pixels=False,
                              image_feature_dim=REGION_DIM, audio_feature_dim=FRAME_DIM, samples_per_shard=500)  # fmt: skip
    readers: list[Any] = []
    for kind in (Ours, OursAhead, Hdf5Slices, Lmdb, WebDataset, Mosaic):
        try:
            readers.append(kind(options.folder, source))
        except ImportError as error:
            print(f"omitted: {kind.name} ({error})")
    size = options.samples * 2 * (REGIONS * REGION_DIM + FRAMES * FRAME_DIM)
    shapes = (BATCH * REGIONS, REGION_DIM), (BATCH * FRAMES, FRAME_DIM)
    batch = tuple(torch.zeros(shape, dtype=torch.float16).numpy() for shape in shapes)  # like a batch in training

    found: dict[str, dict[str, list[tuple[float, float]]]] = {
        r.name: {"view": [], "packed": [], "cold": []} for r in readers
    }
    for reader in readers:  # warm the caches of all
        packed(reader, np.arange(options.samples), batch)
    for repeat in range(options.repeats):
        for reader in readers:
            order = np.random.default_rng(repeat).permutation(options.samples)
            found[reader.name]["view"].append(timed(partial(view, reader, order)))
            found[reader.name]["packed"].append(timed(partial(packed, reader, order, batch)))
    plain: list[tuple[float, float]] = []
    stayed = 0.0
    for repeat in range(options.cold_repeats):
        for reader in readers:
            order = np.random.default_rng(100 + repeat).permutation(options.samples)
            for each in readers:  # two of them map the same files
                if hasattr(each, "reopen"):
                    each.reopen()
            stayed = max(stayed, drop(reader.files))
            found[reader.name]["cold"].append(timed(partial(packed, reader, order, batch)))
        for each in readers[:2]:
            each.reopen()
        stayed = max(stayed, drop(readers[0].files))
        plain.append(timed(lambda: sequential(readers[0].files)))

    def rate(times: list[tuple[float, float]], which: int = 0) -> float:
        return size / statistics.median(pair[which] for pair in times) / 1e9

    walls = {(name, end): [wall for wall, _ in times] for name, ends in found.items() for end, times in ends.items()}
    ratios = {
        f"{Ours.name} over {name}, {end}, warm": median_ratio(walls[name, end], walls[Ours.name, end])
        for name in (Hdf5Slices.name, Lmdb.name) if name in found for end in ("view", "packed")
    }  # fmt: skip
    sequential_walls = [wall for wall, _ in plain]
    ratios[f"{OursAhead.name} over sequential, cold"] = median_ratio(sequential_walls, walls[OursAhead.name, "cold"])
    result = {
        "samples": options.samples, "bytes_a_sample": size // options.samples, "repeats": options.repeats,
        "cold_repeats": options.cold_repeats, "pages_that_stayed": stayed, "memcpy_gb_per_s": memory_rate() / 1e9,
        "load_average": os.getloadavg()[0], "processors": os.cpu_count(), "sequential_cold_gb_per_s": rate(plain),
        "times_as_fast": ratios,
        "readers": {
            name: {f"{end}_{unit}": rate(times, which) for end, times in ends.items()
                   for which, unit in enumerate(("gb_per_s", "gb_per_cpu_s"))}
            for name, ends in found.items()
        },
    }  # fmt: skip
    write_json(options.output, result)
    print(
        f"{options.samples} samples of {size / options.samples / 1e6:.2f} MB; GB/s in wall-clock time (in processor time)"
    )
    print("| reader | view, warm | packed, warm | packed, cold |\n|---|---|---|---|")
    for name, ends in found.items():
        cells = [f"{rate(ends[end]):.2f} ({rate(ends[end], 1):.2f})" for end in ("view", "packed", "cold")]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| sequential read of the same files | | | {rate(plain):.2f} |")
    print(
        "speed of opt_ds relative to, within a turn: "
        + "; ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items())
    )
    print(json.dumps({key: value for key, value in result.items() if key not in ("readers", "times_as_fast")}))
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
