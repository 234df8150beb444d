"""Micro-batches: a step's samples spread over ranks and accumulation rounds, equal in cost, within the token budget."""

import heapq
from dataclasses import dataclass

import numpy as np

from opt_ds.data.compiled import as_tensor, plan_operators

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
    order = np.argsort(-costs, kind="stable")
    rounds = max(1, -(-int(num_tokens.sum()) // (world_size * max_tokens)))
    while (assigned := _assign(num_tokens[order], costs[order], world_size * rounds, max_tokens)) is None:
        rounds += max(1, rounds // 64)  # by one alone, a step of 10,240 samples of a third of the budget takes minutes
    sums = _sums(costs[order], assigned, world_size * rounds)
    tokens = np.bincount(assigned, num_tokens[order], minlength=len(sums)).astype(np.int64).tolist()
    own_slots = _grouped(slots[order], assigned, len(sums))
    dearest_first = np.lexsort((np.arange(len(sums)), -sums)).tolist()
    micro_batches: list[list[MicroBatchPlan]] = [[] for _ in range(world_size)]
    for place, number in enumerate(dearest_first):  # to and fro over the ranks, so that their sums are equal too
        lap, rank = divmod(place, world_size)
        rank = rank if lap % 2 == 0 else world_size - 1 - rank
        micro_batches[rank].append(MicroBatchPlan(own_slots[number], tokens[number], float(sums[number])))
    return micro_batches


def _grouped(slots: np.ndarray, assigned: np.ndarray, bins: int) -> list[np.ndarray]:
    """Return each micro-batch's slots, ascending."""
    ends = np.cumsum(np.bincount(assigned, minlength=bins))
    ordered = slots[np.lexsort((slots, assigned))].astype(np.int64)
    return [ordered[start:end] for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]


def _sums(costs: np.ndarray, assigned: np.ndarray, bins: int) -> np.ndarray:
    """Return float64 [bins], the same bits as `np.sum` over each micro-batch's costs in their order, many at a time."""
    counts = np.bincount(assigned, minlength=bins)
    ordered, starts = costs[np.argsort(assigned, kind="stable")], np.cumsum(counts) - counts
    sums = np.zeros(bins)
    for count in np.unique(counts[counts > 0]):
        own = np.flatnonzero(counts == count)
        sums[own] = ordered[starts[own][:, None] + np.arange(count)].sum(1)
    return sums


def _assign(num_tokens: np.ndarray, costs: np.ndarray, bins: int, max_tokens: int) -> np.ndarray | None:
    """Return int64 [n], the micro-batch of each sample (given in the order of being taken); None if one finds no room."""
    operators = plan_operators()
    if operators is None:
        return _assign_in_python(num_tokens, costs, bins, max_tokens)
    assigned = operators.assign_samples(as_tensor(num_tokens), as_tensor(costs), bins, max_tokens, _TRIES).numpy()
    return assigned if len(assigned) == len(costs) else None


def _assign_in_python(num_tokens: np.ndarray, costs: np.ndarray, bins: int, max_tokens: int) -> np.ndarray | None:
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
