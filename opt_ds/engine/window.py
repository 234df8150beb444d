"""What is summed up between two logs: losses, samples, tokens, times."""

import ctypes
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opt_ds.config import Config
from opt_ds.data.flops import step_flops
from opt_ds.data.loader import MicroBatchLoader
from opt_ds.data.planned import DRAWS, PlannedStep
from opt_ds.engine.hardware import PeakFlops
from opt_ds.engine.metrics import TermSums
from opt_ds.store.reader import FeatureStore

if TYPE_CHECKING:
    from opt_ds.engine.step import StepResult


class Window:
    """What is summed up between two logs."""

    def __init__(self, config: Config, loader: MicroBatchLoader, peak: PeakFlops) -> None:
        self._config, self._loader, self._peak = config, loader, peak
        self.restart()

    def restart(self) -> None:
        self.sums = TermSums()
        self._samples = self._tokens = self._steps = 0
        self._flops, self._draws = 0.0, np.zeros(len(DRAWS))
        self._fill = self._balance = 0.0
        self._norm = float("nan")
        self._start, self._waited = time.perf_counter(), self._loader.wait_s

    def add(self, planned: PlannedStep, result: "StepResult") -> None:
        """Count a step; losses that are not finite are left out."""
        if result.sums is not None:
            self.sums.include(result.sums)
        self._steps += 1
        self._samples += planned.num_samples
        self._tokens += planned.num_tokens
        self._flops += step_flops(self._config, planned.samples).total
        draw = planned.samples.draw
        self._draws += np.bincount(draw[draw >= 0], minlength=len(DRAWS))
        self._fill += planned.fill
        self._balance += planned.balance
        self._norm = result.gradient_norm

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def gradient_norm(self) -> float:
        """Of the last step, before clipping; infinite where it overflowed."""
        return self._norm

    def rates(self) -> dict[str, float]:
        """Over all ranks, but `tflops_per_rank`; `flops_utilisation` is its share of the device's peak (model FLOPs: padding and
        recomputation do not count)."""
        seconds = max(self.seconds(), 1e-9)
        flops = self._flops / seconds / self._loader.world_size
        drawn = {draw: count for draw, count in zip(DRAWS, self._draws.tolist(), strict=True) if count}
        return {
            "samples_per_s": self._samples / seconds,
            "tokens_per_s": self._tokens / seconds,
            **{f"samples_per_s/{draw}": count / seconds for draw, count in drawn.items()},
            "tflops_per_rank": flops / 1e12,
            "flops_utilisation": flops / self._peak.flops_per_s,
            "seconds_per_step": seconds / self._steps,
            "fill": self._fill / self._steps,
            "rank_balance": self._balance / self._steps,
            "data_wait_share": (self._loader.wait_s - self._waited) / seconds,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training."""
        began, waited = time.perf_counter(), self._loader.wait_s
        yield
        self._start += time.perf_counter() - began
        self._waited += self._loader.wait_s - waited


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
    _GROWTH = 1.0

    def __init__(self, stores: list[FeatureStore]) -> None:
        self._stores, self._limit = stores, 0.0
        self._trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; elsewhere there is none

    def after_micro_batch(self, number: int) -> None:
        """Give memory back if it is time to; `number` counts from 0 in each step."""
        if number < self._FIRST:
            self._limit = max(self._limit, _resident_pages() * self._GROWTH)
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
