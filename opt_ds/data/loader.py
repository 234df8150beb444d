"""Micro-batches made ahead of the training step, in the known order, by threads.

A thread plans and reads ahead (see `plan_ahead`), others pack. Threads suffice: the work is memory-mapped copies and NumPy, which
release the interpreter lock for their larger part, and the maps stay shared. Order and content do not depend on the number of
threads.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from opt_ds.data.batch import PackedBatch, Packer
from opt_ds.data.plan_ahead import PlanAhead
from opt_ds.data.planned import Plan, PlannedStep
from opt_ds.data.samples import SampleReader
from opt_ds.data.shared_plans import SharedPlans


class MicroBatchLoader:
    """One rank's micro-batches of the plan's steps, on the device."""

    def __init__(
        self, plan: Plan, rank: int, world_size: int, device: torch.device, shared: SharedPlans | None = None
    ) -> None:
        """`shared`: the plan of the steps as this node's ranks share it; None: this rank plans every step."""
        self._shared = shared
        self.plan, self.rank, self.world_size, self.device = plan, rank, world_size, device
        self.wait_s = 0.0  # seconds that the consumer has waited for data so far
        data = plan.config.data
        self._ahead, self._read_ahead_bytes = data.prefetch_batches, data.read_ahead_mib * 2**20
        self._reader = SampleReader(plan.config, plan.stores)
        self._packer = Packer(plan.config, plan.stores[0].description.tokenizer)
        self._threads = ThreadPoolExecutor(data.workers, thread_name_prefix="pack")

    def steps(self, first: int, last: int) -> Iterator[tuple[PlannedStep, Iterator[PackedBatch]]]:
        """Steps first … last − 1, each with this rank's micro-batches; consume a step's batches before the next step."""
        if self._shared is not None:
            return self._run(self._shared.steps(first, last))
        return self._run(self.plan.step(step, self.world_size) for step in range(first, last))

    def validation(self, max_samples: int) -> Iterator[tuple[PlannedStep, Iterator[PackedBatch]]]:
        """The fixed validation pass, chunk by chunk."""
        return self._run(iter(self.plan.validation(self.world_size, max_samples)))

    def batch_of(self, planned: PlannedStep, slots: Iterable[int]) -> PackedBatch:
        """These samples of a step in one batch, on the host."""
        return self._packer.pack([self._reader.read(planned.samples, int(slot)) for slot in slots])

    def sample_names(self, planned: PlannedStep) -> list[str]:
        """Names of this rank's samples of a step."""
        return [name for m in planned.micro_batches[self.rank] for name in self.batch_of(planned, m.slots).sample_names]

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, planned_steps: Iterator[PlannedStep]) -> Iterator[tuple[PlannedStep, Iterator[PackedBatch]]]:
        ahead = PlanAhead(planned_steps, self.rank, self._reader.read_ahead, self._read_ahead_bytes)
        waiting: deque[tuple[PlannedStep, Future[PackedBatch]]] = deque()
        left = 0  # micro-batches of the step that the consumer is at

        def fill(*, wait: bool) -> None:
            """Have the next micro-batches packed; `wait` for the plan if there is none at all."""
            while len(waiting) < self._ahead and (following := ahead.take(wait=wait and not waiting)) is not None:
                planned, place, _ = following
                waiting.append((planned, self._threads.submit(self._make, planned, place)))

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
                planned = waiting[0][0]
                left = len(planned.micro_batches[self.rank])
                yield planned, batches()
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

    def _make(self, planned: PlannedStep, number: int) -> PackedBatch:
        batch = self.batch_of(planned, planned.micro_batches[self.rank][number].slots)
        return batch.pin_memory() if self.device.type == "cuda" else batch
