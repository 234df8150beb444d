"""Host memory of a training run: its peak, and settings that make the allocator keep freed memory within bounds."""

import ctypes
import gc
import os
import resource
from pathlib import Path
from typing import Any

import torch

from opt_ds.store.reader import FeatureStore

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
# Read by oneDNN at its first operator.
_PRIMITIVE_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")
# fp32: about the most primitives that a micro-batch creates for GELU. bf16: also attention's products, whose shapes
# recur (PaddedGroups).
_PRIMITIVES = {"fp32": 16, "bf16": 512}


def keep_freed_memory(device_type: str) -> str:
    """Make this process's allocator keep freed memory for later allocations, on the CPU only.

    Return a description of what it does.

    Only glibc's allocator supports this. It is left unchanged if the environment has settings for it.

    By default glibc returns large blocks to the system. Every micro-batch on a CPU then gets its hundreds of megabytes
    again page by page, zeroed by the kernel (measured: benchmarks/README.md). `MemoryKeeper` bounds the memory that is
    kept.
    """
    if device_type != "cpu":
        return "the allocator's default: tensors are not in host memory"
    own = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if own:
        return f"set by the environment ({', '.join(sorted(own))})"
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
    told = mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)
    return "kept" if told else "the allocator's default: it is not glibc's"


def keep_few_primitives(device_type: str, precision: str) -> str:
    """Make oneDNN cache machine code for only the last few shapes, on the CPU only.

    Return a description with the number.

    It is left unchanged if the environment has a setting for it. Call this before the first oneDNN operator.

    oneDNN generates code for every new shape (of GELU; in bf16 also of matrix products). Packed micro-batches seldom
    have the same number of rows twice, so most of the default 1,024 entries are useless. Each entry lies between the
    tensors of its micro-batch and fragments the memory freed around it (measured: benchmarks/README.md). Shapes that do
    recur stay cached: within the layers of a micro-batch, and in the padded groups of bf16 attention.
    """
    if device_type != "cpu":
        return "oneDNN's default: operators do not run there"
    own = [name for name in _PRIMITIVE_CACHE if name in os.environ]
    if own:
        return f"set by the environment ({', '.join(own)})"
    few = _PRIMITIVES["fp32" if precision == "fp32" else "bf16"]
    os.environ[_PRIMITIVE_CACHE[0]] = str(few)
    return f"the last {few}"


def spare_loaded_objects() -> None:
    """Exclude the objects that exist now (modules, stores, the step plan) from Python's garbage collection.

    DeepSpeed's engine triggers six collections while it is constructed. Each scanned the half a million objects of
    torch and DeepSpeed, for up to a second on an EPYC (Zen 3).
    """
    gc.collect()  # otherwise existing garbage would never be freed
    gc.freeze()


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated memory on a GPU, this process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:  # getrusage's maximum includes that of the program that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 2**20
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MemoryKeeper:
    """Keeps the host memory of a long accumulation close to that of a short one.

    Micro-batches differ in shape, so some freed memory is fragmented into pieces too small for later allocations.
    Mapped pages of the stores accumulate too. Once the resident memory exceeds that of a step's first micro-batches,
    the stores' pages are released, which is nearly free. If that is not enough, freed memory is returned to the system.
    This happens seldom, because the next micro-batch has to allocate that memory again.
    """

    _FIRST = 3  # micro-batches that show how much memory is needed
    _ROOM = 1.05  # allowed resident memory, relative to the needed memory
    _EVERY = 16  # minimum number of micro-batches between two returns of freed memory

    def __init__(self, stores: list[FeatureStore]) -> None:
        self._stores, self._needed, self._since_trim = stores, 0, self._EVERY
        self._trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only

    def after_micro_batch(self, number: int) -> None:
        """Release memory if it has grown. `number` counts micro-batches from 0 in each step."""
        self._since_trim += 1
        if number < self._FIRST:
            self._needed = max(self._needed, _resident_pages())
        elif self._has_grown():
            for store in self._stores:
                store.release_pages()
            if self._trim and self._since_trim >= self._EVERY and self._has_grown():
                self._trim(0)
                self._since_trim = 0

    def _has_grown(self) -> bool:
        return _resident_pages() > self._needed * self._ROOM


def _resident_pages() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1])
