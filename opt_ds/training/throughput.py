"""Throughput meter: losses, samples, tokens and times between two log lines."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from opt_ds.config import Config
from opt_ds.data.loader import MicroBatchLoader
from opt_ds.data.step_plan import StepPlan
from opt_ds.training.hardware import PeakFlops
from opt_ds.training.metrics import TermSums

if TYPE_CHECKING:
    from opt_ds.training.step import StepResult


class ThroughputMeter:
    """Accumulates losses, samples, tokens and times between two log lines."""

    def __init__(self, config: Config, loader: MicroBatchLoader, peak: PeakFlops) -> None:
        self._config, self._loader, self._peak = config, loader, peak
        self.restart()

    def restart(self) -> None:
        """Reset all sums and restart the clock."""
        self.sums = TermSums()
        self._samples = self._tokens = self._steps = 0
        self._flops, self._by_task = 0.0, np.zeros(len(self._loader.plan.task_names))
        self._packing_efficiency = self._load_imbalance = 0.0
        self._norm = float("nan")
        self._start, self._waited = time.perf_counter(), self._loader.wait_s

    def add(self, step_plan: StepPlan, result: "StepResult") -> None:
        """Add a step. Losses that are not finite are not included."""
        if result.sums is not None:
            self.sums.include(result.sums)
        self._steps += 1
        self._samples += step_plan.num_samples
        self._tokens += step_plan.num_tokens
        self._flops += step_plan.flops
        task = step_plan.samples.task[: step_plan.num_samples]
        self._by_task += np.bincount(task[task >= 0], minlength=len(self._by_task))
        self._packing_efficiency += step_plan.packing_efficiency
        self._load_imbalance += step_plan.load_imbalance
        self._norm = result.gradient_norm

    def seconds(self) -> float:
        """Return the seconds since the last restart, without paused time."""
        return time.perf_counter() - self._start

    def gradient_norm(self) -> float:
        """Return the gradient norm of the last step, before clipping; infinite if it overflowed."""
        return self._norm

    def rates(self) -> dict[str, float]:
        """Return rates over all ranks; `tflops_per_rank` and `flops_utilisation` are per rank.

        `flops_utilisation` is the fraction of the device's peak. It counts model FLOPs, without padding and
        recomputation.
        """
        seconds = max(self.seconds(), 1e-9)
        flops = self._flops / seconds / self._loader.world_size
        by_task = zip(self._loader.plan.task_names, self._by_task.tolist(), strict=True)
        return {
            "samples_per_s": self._samples / seconds,
            "tokens_per_s": self._tokens / seconds,
            **{f"samples_per_s/{task}": count / seconds for task, count in by_task if count},
            "tflops_per_rank": flops / 1e12,
            "flops_utilisation": flops / self._peak.flops_per_s,
            "seconds_per_step": seconds / self._steps,
            "packing_efficiency": self._packing_efficiency / self._steps,
            "load_imbalance": self._load_imbalance / self._steps,
            "data_wait_fraction": (self._loader.wait_s - self._waited) / seconds,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside this context from the training time."""
        began, waited = time.perf_counter(), self._loader.wait_s
        yield
        self._start += time.perf_counter() - began
        self._waited += self._loader.wait_s - waited
