"""Micro-batches: a step's samples spread over ranks and accumulation rounds, equal in cost, within the token budget."""

import heapq
from dataclasses import dataclass

import numpy as np

_TRIES = 64  # micro-batches that a sample is offered, the cheapest first


@dataclass(frozen=True)
class MicroBatchPlan:
    """Slots (places of samples in the step) that one forward and backward pass takes."""

    slots: np.ndarray  # int64, ascending
    num_tokens: int
    cost: float  # operations, or what `distribute` was told to balance


def distribute(
    slots: np.ndarray, num_tokens: np.ndarray, world_size: int, max_tokens: int, costs: np.ndarray | None = None
) -> list[list[MicroBatchPlan]]:
    """Equally many micro-batches for each rank, [rank][k], none above `max_tokens`, costs as equal as may be.

    costs: float64, of each sample; None: its tokens. The ranks' sums are balanced, and the k-th micro-batches of the ranks among
    each other. Longest-processing-time-first: each sample, the dearest first, joins the cheapest micro-batch with room for it. A
    micro-batch is empty only when there are fewer samples than micro-batches.
    """
    assert not len(num_tokens) or num_tokens.max() <= max_tokens, "the config checks that each sample fits"
    costs = num_tokens.astype(np.float64) if costs is None else costs
    rounds = max(1, -(-int(num_tokens.sum()) // (world_size * max_tokens)))
    while (members := _dearest_first(num_tokens, costs, world_size * rounds, max_tokens)) is None:
        rounds += max(1, rounds // 64)  # by one alone, a step of 10,240 samples of a third of the budget takes minutes
    sums = [float(costs[own].sum()) for own in members]
    dearest_first = sorted(range(len(members)), key=lambda m: (-sums[m], m))
    micro_batches: list[list[MicroBatchPlan]] = [[] for _ in range(world_size)]
    for place, number in enumerate(dearest_first):  # to and fro over the ranks, so that their sums are equal too
        lap, rank = divmod(place, world_size)
        rank = rank if lap % 2 == 0 else world_size - 1 - rank
        own = members[number]
        micro_batches[rank].append(MicroBatchPlan(np.sort(slots[own]), int(num_tokens[own].sum()), sums[number]))
    return micro_batches


def _dearest_first(num_tokens: np.ndarray, costs: np.ndarray, bins: int, max_tokens: int) -> list[np.ndarray] | None:
    """Samples of each micro-batch; None if a sample finds no room."""
    members: list[list[int]] = [[] for _ in range(bins)]
    tokens = [0] * bins
    heap = [(0.0, number) for number in range(bins)]
    order = np.argsort(-costs, kind="stable")
    least = np.minimum.accumulate(num_tokens[order][::-1])[::-1]  # of this sample and all after it
    for sample, smallest in zip(order.tolist(), least.tolist(), strict=True):
        own = int(num_tokens[sample])
        full: list[tuple[float, int]] = []
        while heap and len(full) < _TRIES:
            cost, number = heapq.heappop(heap)
            if tokens[number] + own <= max_tokens:
                members[number].append(sample)
                tokens[number] += own
                heapq.heappush(heap, (cost + float(costs[sample]), number))
                break
            if tokens[number] + smallest <= max_tokens:  # otherwise it is full for good
                full.append((cost, number))
        else:
            return None
        for item in full:
            heapq.heappush(heap, item)
    return [np.array(own, dtype=np.int64) for own in members]
