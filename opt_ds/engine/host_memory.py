"""Host memory of a training run: how much it held, and that the allocator keeps what is freed, within bounds."""

import ctypes
import os
import resource
from pathlib import Path
from typing import Any

import torch

from opt_ds.store.reader import FeatureStore

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory(device_type: str) -> str:
    """Have this process's allocator keep freed memory for what is allocated next, where the device is the CPU; says what it does
    with it now. Only glibc's can be told, and it is left as it is where the environment has settings for it.

    Left to itself glibc returns large blocks to the system, and every micro-batch on a CPU has its hundreds of megabytes handed
    out anew, page by page, zeroed by the kernel (measured: benchmarks/README.md). `MemoryKeeper` bounds what is kept.
    """
    if device_type != "cpu":
        return "the allocator's default: tensors are not in host memory"
    own = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if own:
        return f"as the environment says ({', '.join(sorted(own))})"
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
    told = mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)
    return "kept" if told else "the allocator's default: it is not glibc's"


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: allocated on a GPU; on the CPU, this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:  # getrusage's maximum includes that of the program that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 2**20
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MemoryKeeper:
    """Keeps the host memory of a long accumulation near that of a short one.

    Micro-batches differ in shape, so freed memory comes to lie in pieces, and pages of the stores pile up: together a third
    more after a hundred micro-batches. Both can be given back, but fetching them again costs time (on a CPU, a twentieth),
    so it is done only in a long accumulation that has grown past what its first micro-batches left.
    """

    _FIRST = 3  # micro-batches that show what is needed

    def __init__(self, stores: list[FeatureStore]) -> None:
        self._stores, self._limit = stores, 0.0
        self._trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; elsewhere there is none

    def after_micro_batch(self, number: int) -> None:
        """Give memory back if it is time to; `number` counts from 0 in each step."""
        if number < self._FIRST:
            self._limit = max(self._limit, _resident_pages())
        elif _resident_pages() > self._limit:
            for store in self._stores:
                store.release_pages()
            if self._trim:
                self._trim(0)
            # What stays is needed; a limit just above it would make us come back at every micro-batch.
            self._limit = max(self._limit, _resident_pages() * 1.1)


def _resident_pages() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1])
