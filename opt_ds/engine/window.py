"""What is summed up between two logs: losses, samples, tokens, times."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opt_ds.data.loader import MicroBatchLoader
from opt_ds.data.plan import PlannedStep
from opt_ds.engine.metrics import TermSums


class Window:
    """What is summed up between two logs."""

    def __init__(self, loader: MicroBatchLoader) -> None:
        self._loader = loader
        self.restart()

    def restart(self) -> None:
        self.sums = TermSums()
        self._samples = self._tokens = self._steps = 0
        self._fill = self._balance = 0.0
        self._norm: Any = None
        self._start, self._waited = time.perf_counter(), self._loader.wait_s

    def add(self, planned: PlannedStep, norm: Any) -> None:
        self._steps += 1
        self._samples += planned.num_samples
        self._tokens += planned.num_tokens
        self._fill += planned.fill
        self._balance += planned.balance
        self._norm = norm

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def gradient_norm(self) -> float:
        """Of the last step, before clipping; infinite where it overflowed."""
        return float(self._norm)

    def rates(self) -> dict[str, float]:
        seconds = max(self.seconds(), 1e-9)
        return {
            "samples_per_s": self._samples / seconds,
            "tokens_per_s": self._tokens / seconds,
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
