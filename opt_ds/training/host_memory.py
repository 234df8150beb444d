"""Host memory of a training run: how much it held, and that the allocator keeps what is freed, whole and within bounds."""

import ctypes
import gc
import os
import resource
from pathlib import Path
from typing import Any

import torch

from opt_ds.store.reader import FeatureStore

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_PRIMITIVE_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")  # read by oneDNN at its first operator
# fp32: what a micro-batch makes for GELU, at most, about. bf16: attention's products too, whose shapes come again (PaddedGroups).
_PRIMITIVES = {"fp32": 16, "bf16": 512}


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


def keep_few_primitives(device_type: str, precision: str) -> str:
    """Have oneDNN keep the machine code of the last few shapes only, where the device is the CPU; says how many. It is left as it
    is where the environment has a setting for it; call before the first operator that it runs.

    It makes code for every new shape (of GELU; in bf16 of matrix products too). Packed micro-batches seldom have the same number
    of rows twice, so most of the last 1,024, its default, are of no use, and each lies amid the tensors of its micro-batch and
    keeps the memory freed around it in pieces (measured: benchmarks/README.md). What comes again is kept: in a micro-batch's
    layers, and in bf16 attention's padded groups.
    """
    if device_type != "cpu":
        return "oneDNN's default: operators do not run there"
    own = [name for name in _PRIMITIVE_CACHE if name in os.environ]
    if own:
        return f"as the environment says ({', '.join(own)})"
    few = _PRIMITIVES["fp32" if precision == "fp32" else "bf16"]
    os.environ[_PRIMITIVE_CACHE[0]] = str(few)
    return f"the last {few}"


def spare_loaded_objects() -> None:
    """Take what is loaded by now out of Python's garbage collections: modules, stores, the plan.

    DeepSpeed's engine calls for six collections while it is made. Each looked at the half a million objects of torch and
    DeepSpeed, for up to a second (an EPYC of Zen 3).
    """
    gc.collect()  # garbage must not be kept for good
    gc.freeze()


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

    Micro-batches differ in shape, so some freed memory comes to lie in pieces too small for what is allocated next, and pages of
    the stores pile up. Once what is held has grown past what a step's first micro-batches left, the stores' pages are given back,
    which costs next to nothing, and if that is not enough, freed memory: seldom, since the next micro-batch fetches it again.
    """

    _FIRST = 3  # micro-batches that show what is needed
    _ROOM = 1.05  # what may be held, over what is needed
    _EVERY = 16  # micro-batches from one return of freed memory to the next, at least

    def __init__(self, stores: list[FeatureStore]) -> None:
        self._stores, self._needed, self._since_trim = stores, 0, self._EVERY
        self._trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; elsewhere there is none

    def after_micro_batch(self, number: int) -> None:
        """Give memory back if it is time to; `number` counts from 0 in each step."""
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
