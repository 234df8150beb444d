"""Measure random reads of complete samples: opt_ds, h5py on the same files, LMDB, WebDataset and Mosaic streaming.

    python benchmarks/reader.py [--samples 2000] [--repeats 7] [--folder FOLDER] [--output reader.json]

Every format holds the same samples, 36 regions of 2,048 and 65 frames of 768 float16: 0.25 MB. The script checks that
all readers return the same values. Two results are timed. `view`: the arrays of each sample can be read (one value of
each is read). `packed`: every byte is copied into the arrays of a batch of 32, as in training. Warm: the repeats of all
readers are interleaved, each in its own random order. Cold: the files' pages are dropped by posix_fadvise(DONTNEED)
before each repeat, and the fraction of pages that stayed is measured. A sequential read of the same files, also dropped
before, is measured too.

h5py is measured twice. In its best form, files and datasets stay open, and `packed` reads straight into the arrays of
the batch. In the other, datasets are looked up by name for each sample, as in many simple loaders. WebDataset has no
random access and is read in the order of its tar files. WebDataset and Mosaic streaming are in
benchmarks/requirements.txt. A reader whose package is missing is omitted, and the script prints that.
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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import machine, ratios, summary  # noqa: E402
from benchmarks.readers import (  # noqa: E402
    FRAME_DIM,
    FRAMES,
    READERS,
    REGION_DIM,
    REGIONS,
    Hdf5,
    Lmdb,
    Ours,
    OursAhead,
    all_samples,
)
from opt_ds.store.files import write_json  # noqa: E402
from opt_ds.store.mapped import MappedFile  # noqa: E402
from opt_ds.store.synthetic import write_synthetic_store  # noqa: E402

BATCH = 32
BLOCK = 8 * 2**20
SAMPLE_BYTES = 2 * (REGIONS * REGION_DIM + FRAMES * FRAME_DIM)
#: Reader -> what is measured -> wall-clock and processor seconds of each repeat.
Times = dict[str, dict[str, list[tuple[float, float]]]]


def view(reader: Any, order: np.ndarray) -> None:
    total = 0.0
    for regions, frames in reader.samples(order):
        total += float(regions[0, 0]) + float(frames[0, 0])
    assert np.isfinite(total)


def packed(reader: Any, order: np.ndarray, batch: tuple[np.ndarray, ...]) -> None:
    """Read batch by batch: by the reader's `fill`, or the arrays of its samples, then all of them concatenated."""
    if getattr(reader, "fill", None) is not None:
        for start in range(0, len(order), BATCH):
            reader.fill(order[start : start + BATCH], batch)
        return
    regions_rv, frames_av = batch
    samples = reader.samples(order)
    while found := list(itertools.islice(samples, BATCH)):
        regions, frames = zip(*found, strict=True)
        np.concatenate(regions, out=regions_rv[: len(found) * REGIONS])
        np.concatenate(frames, out=frames_av[: len(found) * FRAMES])


def check_same_values(readers: Sequence[Any], source: Path, count: int, batch: tuple[np.ndarray, ...]) -> None:
    """Raise ValueError if a reader's first samples, or the batch that it fills, are not those of the store.

    Args:
        readers: The readers.
        source: The store.
        count: Number of samples, at most BATCH.
        batch: Arrays of a batch, which are overwritten.
    """
    order = np.arange(count)
    expected = [np.concatenate(parts) for parts in zip(*itertools.islice(all_samples(source), count), strict=True)]
    for reader in readers:
        found = [np.concatenate(parts) for parts in zip(*reader.samples(order), strict=True)]
        for array in batch:
            array.fill(0)
        packed(reader, order, batch)
        filled = [array[: len(rows)] for array, rows in zip(batch, expected, strict=True)]
        for what, arrays in (("samples", found), ("batch", filled)):
            if not all(map(np.array_equal, arrays, expected)):
                raise ValueError(f"{reader.name}: its {what} differ from the store's")


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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="number of samples. Default: 2000")
    parser.add_argument("--repeats", type=int, default=7, help="warm repeats. Default: 7")
    parser.add_argument("--cold-repeats", type=int, default=5, help="cold repeats. Default: 5")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("/var/tmp/opt_ds-reader"),
        help="folder on a disk, not on a memory file system",
    )
    parser.add_argument("--output", type=Path, default=Path("reader.json"))
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    return parser.parse_args(arguments)


def open_readers(folder: Path, source: Path) -> list[Any]:
    """Return the readers whose packages are installed. Formats that are missing are written into the folder."""
    readers: list[Any] = []
    for kind in READERS:
        try:
            readers.append(kind(folder, source))
        except ImportError as error:
            print(f"omitted: {kind.name} ({error})")
    return readers


def measure_warm(readers: Sequence[Any], samples: int, repeats: int, batch: tuple[np.ndarray, ...]) -> Times:
    """Return the times of `view` and `packed` with all files in the system's cache."""
    found: Times = {reader.name: {"view": [], "packed": []} for reader in readers}
    for reader in readers:  # warm the caches of all
        packed(reader, np.arange(samples), batch)
    for repeat in range(repeats):
        for reader in readers:
            order = np.random.default_rng(repeat).permutation(samples)
            found[reader.name]["view"].append(timed(partial(view, reader, order)))
            found[reader.name]["packed"].append(timed(partial(packed, reader, order, batch)))
    return found


def measure_cold(
    readers: Sequence[Any], samples: int, repeats: int, batch: tuple[np.ndarray, ...]
) -> tuple[Times, list[tuple[float, float]], float]:
    """Measure reads of files that are not in the system's cache.

    Args:
        readers: The readers; the first one's files are also read sequentially.
        samples: Number of samples.
        repeats: Number of repeats.
        batch: Arrays of a batch.

    Returns:
        The times of `packed`, named "cold", those of a sequential read, and the largest fraction of pages that stayed.
    """
    found: Times = {reader.name: {"cold": []} for reader in readers}
    plain: list[tuple[float, float]] = []
    stayed = 0.0

    def drop_files(files: list[Path]) -> float:
        for reader in readers:  # several map the same files
            if hasattr(reader, "reopen"):
                reader.reopen()
        return max(stayed, drop(files))

    for repeat in range(repeats):
        for reader in readers:
            order = np.random.default_rng(100 + repeat).permutation(samples)
            stayed = drop_files(reader.files)
            found[reader.name]["cold"].append(timed(partial(packed, reader, order, batch)))
        stayed = drop_files(readers[0].files)
        plain.append(timed(lambda: sequential(readers[0].files)))
    return found, plain, stayed


def speeds_of_ours(found: Times, plain: list[tuple[float, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return by how much opt_ds is faster than others within a turn.

    The result is comparison -> "wall" and "processor" time -> median, smallest and largest ratio.
    """

    def compared(others: list[tuple[float, float]], own: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
        clocks = zip(("wall", "processor"), zip(*others, strict=True), zip(*own, strict=True), strict=True)
        return {clock: summary(ratios(list(theirs), list(ours))) for clock, theirs, ours in clocks}

    faster = {
        f"{Ours.name} over {name}, {end}, warm": compared(found[name][end], found[Ours.name][end])
        for name in (Hdf5.name, Lmdb.name) if name in found for end in ("view", "packed")
    }  # fmt: skip
    return faster | {f"{OursAhead.name} over sequential, cold": compared(plain, found[OursAhead.name]["cold"])}


def main() -> None:
    options, about = parse(), machine()
    for name, value in about.items():
        print(f"{name}: {value}")
    options.folder.mkdir(parents=True, exist_ok=True)
    source = options.folder / f"store-{options.samples}"
    if not (source / "store.json").is_file():
        write_synthetic_store(
            source, options.samples, regions=(REGIONS, REGIONS), frames=(FRAMES, FRAMES), pixels=False,
            image_feature_dim=REGION_DIM, audio_feature_dim=FRAME_DIM, samples_per_shard=500,
        )  # fmt: skip
    readers = open_readers(options.folder, source)
    shapes = (BATCH * REGIONS, REGION_DIM), (BATCH * FRAMES, FRAME_DIM)
    batch = tuple(torch.zeros(shape, dtype=torch.float16).numpy() for shape in shapes)  # like a batch in training
    check_same_values(readers, source, min(BATCH, options.samples), batch)
    found = measure_warm(readers, options.samples, options.repeats, batch)
    cold, plain, stayed = measure_cold(readers, options.samples, options.cold_repeats, batch)
    for name, ends in cold.items():
        found[name] |= ends
    result = {
        "samples": options.samples, "bytes_a_sample": SAMPLE_BYTES, "repeats": options.repeats,
        "cold_repeats": options.cold_repeats, "pages_that_stayed": stayed, "memcpy_gb_per_s": memory_rate() / 1e9,
        "machine": about, "sequential_cold_gb_per_s": rate(plain, options.samples),
        "times_as_fast": speeds_of_ours(found, plain),
        "readers": {
            name: {f"{end}_{unit}": rate(times, options.samples, which) for end, times in ends.items()
                   for which, unit in enumerate(("gb_per_s", "gb_per_cpu_s"))}
            | {f"{end}_seconds": [wall for wall, _ in times] for end, times in ends.items()}
            for name, ends in found.items()
        },
    }  # fmt: skip
    write_json(options.output, result)
    report(found, plain, options.samples, result)
    if not options.keep:
        shutil.rmtree(options.folder)


def rate(times: list[tuple[float, float]], samples: int, which: int = 0) -> float:
    """Return GB/s of the median repeat, in wall-clock (0) or processor time (1)."""
    return samples * SAMPLE_BYTES / statistics.median(pair[which] for pair in times) / 1e9


def report(found: Times, plain: list[tuple[float, float]], samples: int, result: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"{samples} samples of {SAMPLE_BYTES / 1e6:.2f} MB; GB/s in wall-clock time (in processor time)")
    print("| reader | view, warm | packed, warm | packed, cold |\n|---|---|---|---|")
    for name, ends in found.items():
        cells = [
            f"{rate(ends[end], samples):.2f} ({rate(ends[end], samples, 1):.2f})" for end in ("view", "packed", "cold")
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| sequential read of the same files | | | {rate(plain, samples):.2f} |")
    print("\n| | faster by: median (range), wall-clock time | processor time |\n|---|---|---|")
    for name, clocks in result["times_as_fast"].items():
        cells = [f"{r['median']:.2f} ({r['min']:.2f}–{r['max']:.2f})" for r in clocks.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    in_tables = ("readers", "times_as_fast", "machine")
    print(json.dumps({key: value for key, value in result.items() if key not in in_tables}))


if __name__ == "__main__":
    main()
