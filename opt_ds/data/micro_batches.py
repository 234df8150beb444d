"""Micro-batches: a step's samples spread over ranks and accumulation rounds, equal in cost, within the token budget."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opt_ds.ops.plan_operators import as_tensor, plan_operators

_TRIES = 64  # micro-batches that a sample is offered, the cheapest first


@dataclass(frozen=True)
class MicroBatchPlan:
    """Slots (places of samples in the step) that one forward and backward pass takes."""

    slots: np.ndarray  # int64, ascending
    num_tokens: int
    cost: float  # operations, or what `distribute` was told to balance


class MicroBatches(Sequence[list[MicroBatchPlan]]):
    """Each rank's micro-batches, [rank][k], equally many on every rank. A rank's are made when they are asked for."""

    def __init__(self, slots: np.ndarray, sizes: np.ndarray, num_tokens: np.ndarray, costs: np.ndarray) -> None:
        """Hold what `distribute` found.

        Args:
            slots: int64 [n], micro-batch by micro-batch, rank by rank; ascending in each micro-batch.
            sizes: int64 [ranks, k], how many slots each micro-batch has.
            num_tokens: int64 [ranks, k].
            costs: float64 [ranks, k].
        """
        self.slots, self.sizes, self.num_tokens, self.costs = slots, sizes, num_tokens, costs
        self._ends = np.cumsum(sizes).reshape(sizes.shape)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, rank: int) -> list[MicroBatchPlan]:  # type: ignore[override]  # no slices
        sizes, ends = self.sizes[rank].tolist(), self._ends[rank].tolist()
        own = zip(sizes, ends, self.num_tokens[rank].tolist(), self.costs[rank].tolist(), strict=True)
        return [MicroBatchPlan(self.slots[end - size : end], tokens, cost) for size, end, tokens, cost in own]

    @property
    def loads(self) -> np.ndarray:
        """float64 [ranks], the cost of each rank's micro-batches, added one after another."""
        return np.add.accumulate(self.costs, axis=1)[:, -1]


def distribute(
    slots: np.ndarray, num_tokens: np.ndarray, world_size: int, max_tokens: int, costs: np.ndarray | None = None
) -> MicroBatches:
    """Equally many micro-batches for each rank, none above `max_tokens`, costs as equal as may be.

    slots: ascending. costs: float64 from 0 on, of each sample; None: its tokens. The ranks' sums are balanced, and the k-th micro-batches of
    the ranks among each other. Longest-processing-time-first: each sample, the dearest first, joins the cheapest micro-batch with
    room for it. A micro-batch is empty only when there are fewer samples than micro-batches.
    """
    assert not len(num_tokens) or num_tokens.max() <= max_tokens, "the config checks that each sample fits"
    costs = num_tokens.astype(np.float64) if costs is None else costs
    operators = plan_operators()
    if operators is None:
        members, sizes, tokens, sums = _distribute_in_numpy(num_tokens, costs, world_size, max_tokens)
    else:
        found = operators.distribute(as_tensor(num_tokens), as_tensor(costs), world_size, max_tokens, _TRIES)
        members, sizes, tokens, sums = (tensor.numpy() for tensor in found)
    by_rank = (world_size, -1)
    return MicroBatches(
        slots[members].astype(np.int64, copy=False), sizes.reshape(by_rank), tokens.reshape(by_rank), sums.reshape(by_rank)
    )


def _distribute_in_numpy(
    num_tokens: np.ndarray, costs: np.ndarray, world_size: int, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the samples' places, micro-batch by micro-batch in the order [rank][k]; each one's size, tokens and cost."""
    order = np.argsort(-costs, kind="stable")
    rounds = max(1, -(-int(num_tokens.sum()) // (world_size * max_tokens)))
    while (assigned := _assign(num_tokens[order], costs[order], world_size * rounds, max_tokens)) is None:
        rounds += max(1, rounds // 64)  # by one alone, a step of 10,240 samples of a third of the budget takes minutes
    bins = world_size * rounds
    sums = _sums(costs[order], assigned, bins)
    lap, rank = np.divmod(np.arange(bins), world_size)
    rank = np.where(lap % 2 == 0, rank, world_size - 1 - rank)  # to and fro over the ranks, so that their sums are equal too
    dearest_first = np.argsort(-sums, kind="stable")
    place_of_bin = np.empty(bins, np.int64)  # micro-batch -> its place in [rank][k]
    place_of_bin[dearest_first] = rank * rounds + lap
    place_of = np.empty(len(costs), np.int64)
    place_of[order] = place_of_bin[assigned]
    sizes = np.bincount(place_of, minlength=bins)
    tokens = np.bincount(place_of, num_tokens, minlength=bins).astype(np.int64)
    return np.argsort(place_of, kind="stable"), sizes, tokens, sums[np.argsort(place_of_bin)]


def _sums(costs: np.ndarray, assigned: np.ndarray, bins: int) -> np.ndarray:
    """Return float64 [bins], the same bits as `np.sum` over each micro-batch's costs in their order."""
    ordered = costs[np.argsort(assigned, kind="stable")]
    ends = np.cumsum(np.bincount(assigned, minlength=bins)).tolist()
    return np.array([ordered[start:end].sum() for start, end in zip([0, *ends[:-1]], ends, strict=True)])


def _assign(num_tokens: np.ndarray, costs: np.ndarray, bins: int, max_tokens: int) -> np.ndarray | None:
    """Return int64 [n], the micro-batch of each sample (given in the order of being taken); None if one finds no room."""
    assigned = np.empty(len(costs), dtype=np.int64)
    tokens = [0] * bins
    heap = [(0.0, number) for number in range(bins)]
    least = np.minimum.accumulate(num_tokens[::-1])[::-1]  # of this sample and all after it
    sizes = zip(num_tokens.tolist(), costs.tolist(), least.tolist(), strict=True)
    for sample, (own, own_cost, smallest) in enumerate(sizes):
        full: list[tuple[float, int]] = []
        while heap and len(full) < _TRIES:
            cost, number = heapq.heappop(heap)
            if tokens[number] + own <= max_tokens:
                assigned[sample] = number
                tokens[number] += own
                heapq.heappush(heap, (cost + own_cost, number))
                break
            if tokens[number] + smallest <= max_tokens:  # otherwise it is full for good
                full.append((cost, number))
        else:
            return None
        for item in full:
            heapq.heappush(heap, item)
    return assigned
