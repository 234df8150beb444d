"""Plans steps ahead of the packing threads, and has the bytes that they will read fetched from the disk, in the known order.

One thread does both. It stays a bounded way ahead, so that neither plans nor pages that nobody has used yet pile up.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from opt_ds.data.planned import PlannedStep
from opt_ds.data.planned_samples import PlannedSamples

_MOST_MICRO_BATCHES = 64  # ahead, however few bytes they have


class Announced(NamedTuple):
    """A micro-batch that is planned: number `place` of this rank's in the step, and the bytes asked for."""

    planned: PlannedStep
    place: int
    num_bytes: int


class PlanAhead:
    """This rank's micro-batches of the steps, in order. At most `max_bytes` are asked for and not taken, or one micro-batch."""

    def __init__(
        self,
        planned_steps: Iterator[PlannedStep],
        rank: int,
        read_ahead: Callable[[PlannedSamples, np.ndarray], int],
        max_bytes: int,
    ) -> None:
        """`read_ahead(samples, slots)` asks for the samples' bytes and says how many; not called when `max_bytes` is 0."""
        self._rank, self._read_ahead, self._max_bytes = rank, read_ahead, max_bytes
        self._ready: deque[Announced] = deque()
        self._changed = threading.Condition()
        self._num_bytes = 0
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(planned_steps,), name="plan", daemon=True)
        self._thread.start()

    def take(self, *, wait: bool) -> Announced | None:
        """The next micro-batch. None: there is none yet, or with `wait` none any more.

        An error of the planning is raised when its turn comes.
        """
        with self._changed:
            while wait and not self._ready and not self._ended:
                self._changed.wait()
            if not self._ready:
                if wait and self._error is not None:
                    raise self._error
                return None
            announced = self._ready.popleft()
            self._num_bytes -= announced.num_bytes
            self._changed.notify_all()
            return announced

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self, planned_steps: Iterator[PlannedStep]) -> None:
        try:
            for planned in planned_steps:
                for place, micro_batch in enumerate(planned.micro_batches[self._rank]):
                    if not self._wait_for_room():
                        return
                    size = self._read_ahead(planned.samples, micro_batch.slots) if self._max_bytes else 0
                    with self._changed:
                        self._ready.append(Announced(planned, place, size))
                        self._num_bytes += size
                        self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait until one more micro-batch may be announced; False when nobody wants it any more."""
        with self._changed:
            while not self._stopped and (self._num_bytes >= max(1, self._max_bytes) or len(self._ready) >= _MOST_MICRO_BATCHES):
                self._changed.wait()
            return not self._stopped
