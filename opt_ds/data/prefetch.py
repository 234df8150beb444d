"""Prefetcher: plans steps ahead of the packing threads and starts reading the bytes that they will need, in order.

One thread does both. It stays a bounded distance ahead, so that neither step plans nor unused pages accumulate.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from opt_ds.data.step_plan import StepPlan
from opt_ds.data.step_samples import StepSamples

_MOST_MICRO_BATCHES = 64  # maximum number of prefetched micro-batches, however few bytes they have


class Prefetched(NamedTuple):
    """A prefetched micro-batch: number `place` of this rank in the step, and the bytes whose reading was started."""

    step_plan: StepPlan
    place: int
    num_bytes: int


class StepPrefetcher:
    """Prefetcher of this rank's micro-batches, in order.

    At most `max_bytes`, or one micro-batch, are prefetched and not yet taken.
    """

    def __init__(
        self,
        step_plans: Iterator[StepPlan],
        rank: int,
        read_ahead: Callable[[StepSamples, np.ndarray], int],
        max_bytes: int,
    ) -> None:
        """Start the thread.

        Args:
            step_plans: The steps.
            rank: This rank.
            read_ahead: Called with samples and global sample indices; starts reading their bytes and returns the number
                of bytes. It is not called if `max_bytes` is 0.
            max_bytes: Maximum number of bytes ahead.
        """
        self._rank, self._read_ahead, self._max_bytes = rank, read_ahead, max_bytes
        self._ready: deque[Prefetched] = deque()
        self._changed = threading.Condition()
        self._num_bytes = 0
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(step_plans,), name="plan", daemon=True)
        self._thread.start()

    def take(self, *, wait: bool) -> Prefetched | None:
        """Return the next micro-batch. Return None if there is none yet or, with `wait`, if there are no more.

        An error of the planning thread is raised when its position is reached.
        """
        with self._changed:
            while wait and not self._ready and not self._ended:
                self._changed.wait()
            if not self._ready:
                if wait and self._error is not None:
                    raise self._error
                return None
            prefetched = self._ready.popleft()
            self._num_bytes -= prefetched.num_bytes
            self._changed.notify_all()
            return prefetched

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self, step_plans: Iterator[StepPlan]) -> None:
        try:
            for step_plan in step_plans:
                micro_batches = step_plan.micro_batches[self._rank]
                for place in step_plan.order(self._rank):
                    if not self._wait_for_capacity():
                        return
                    size = self._read_ahead(step_plan.samples, micro_batches[place].indices) if self._max_bytes else 0
                    with self._changed:
                        self._ready.append(Prefetched(step_plan, place, size))
                        self._num_bytes += size
                        self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _wait_for_capacity(self) -> bool:
        """Wait until one more micro-batch may be prefetched. Return False if the prefetcher is closed."""
        with self._changed:
            while not self._stopped and (self._num_bytes >= max(1, self._max_bytes) or len(self._ready) >= _MOST_MICRO_BATCHES):
                self._changed.wait()
            return not self._stopped
