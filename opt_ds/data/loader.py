"""Loader that prepares micro-batches ahead of the training step, in a fixed order, in threads.

One thread plans and reads ahead (see `prefetch`); the others pack. Threads are sufficient, because most of the work
is copies from memory maps and NumPy operations, which release the interpreter lock, and the maps stay shared. Order and
content do not depend on the number of threads.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from opt_ds.data.batch import PackedBatch, Packer
from opt_ds.data.prefetch import StepPrefetcher
from opt_ds.data.samples import SampleReader
from opt_ds.data.shared_plans import SharedPlans
from opt_ds.data.step_plan import Plan, StepPlan


class MicroBatchLoader:
    """Micro-batches of one rank for the steps of the step plan, on the device."""

    def __init__(
        self, plan: Plan, rank: int, world_size: int, device: torch.device, shared: SharedPlans | None = None
    ) -> None:
        """Create the loader.

        Args:
            plan: The step plan.
            rank: This rank.
            world_size: Number of ranks.
            device: Device of the batches.
            shared: The step plan as shared by this node's ranks. None: this rank plans every step itself.
        """
        self._shared = shared
        self.plan, self.rank, self.world_size, self.device = plan, rank, world_size, device
        self.wait_s = 0.0  # seconds for which the consumer has waited for data so far
        data = plan.config.data
        self._ahead, self._read_ahead_bytes = data.prefetch_batches, data.read_ahead_mib * 2**20
        self._reader = SampleReader(plan.config, plan.stores)
        self._packer = Packer(plan.config, plan.stores[0].description.tokenizer)
        self._threads = ThreadPoolExecutor(data.workers, thread_name_prefix="pack")

    def steps(self, first: int, last: int) -> Iterator[tuple[StepPlan, Iterator[PackedBatch]]]:
        """Yield steps first … last − 1 with this rank's micro-batches, in the order of `StepPlan.order`.

        A step's batches must be consumed before the next step.
        """
        if self._shared is not None:
            return self._run(self._shared.steps(first, last))
        return self._run(self.plan.step(step, self.world_size) for step in range(first, last))

    def validation(self, max_samples: int) -> Iterator[tuple[StepPlan, Iterator[PackedBatch]]]:
        """Yield the chunks of the fixed validation pass with this rank's micro-batches."""
        return self._run(iter(self.plan.validation(self.world_size, max_samples)))

    def batch_of(self, step_plan: StepPlan, indices: Iterable[int]) -> PackedBatch:
        """Return these samples of a step as one batch on the host."""
        return self._packer.pack([self._reader.read(step_plan.samples, int(index)) for index in indices])

    def sample_names(self, step_plan: StepPlan) -> list[str]:
        """Return the names of this rank's samples of a step."""
        return [
            name
            for m in step_plan.micro_batches[self.rank]
            for name in self.batch_of(step_plan, m.indices).sample_names
        ]

    def close(self) -> None:
        """Stop the packing threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, step_plans: Iterator[StepPlan]) -> Iterator[tuple[StepPlan, Iterator[PackedBatch]]]:
        ahead = StepPrefetcher(step_plans, self.rank, self._reader.read_ahead, self._read_ahead_bytes)
        waiting: deque[tuple[StepPlan, Future[PackedBatch]]] = deque()
        left = 0  # micro-batches left of the step that is being consumed

        def fill(*, wait: bool) -> None:
            """Submit the next micro-batches for packing. With `wait`, wait for the step plan if none is submitted."""
            while len(waiting) < self._ahead and (following := ahead.take(wait=wait and not waiting)) is not None:
                step_plan, place, _ = following
                waiting.append((step_plan, self._threads.submit(self._make, step_plan, place)))

        def batches() -> Iterator[PackedBatch]:
            nonlocal left
            while left:
                left -= 1
                with self._waited():
                    fill(wait=True)
                    batch = waiting.popleft()[1].result()
                fill(wait=False)
                yield batch.to(self.device, non_blocking=True)

        try:
            while True:
                with self._waited():
                    fill(wait=True)
                if not waiting:
                    return
                step_plan = waiting[0][0]
                left = len(step_plan.order(self.rank))
                yield step_plan, batches()
                assert not left, "a step's micro-batches are all consumed before the next"
        finally:
            ahead.close()
            for _, future in waiting:
                future.cancel()

    @contextmanager
    def _waited(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.wait_s += time.perf_counter() - start

    def _make(self, step_plan: StepPlan, number: int) -> PackedBatch:
        batch = self.batch_of(step_plan, step_plan.micro_batches[self.rank][number].indices)
        return batch.pin_memory() if self.device.type == "cuda" else batch
