"""Micro-batches: a step's samples spread over ranks and accumulation rounds, equal in positions, within the token budget."""

import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroBatchPlan:
    """Slots (places of samples in the step) that one forward and backward pass takes."""

    slots: np.ndarray  # int64, ascending
    num_tokens: int


def distribute(slots: np.ndarray, num_tokens: np.ndarray, world_size: int, max_tokens: int) -> list[list[MicroBatchPlan]]:
    """Equally many micro-batches for each rank, [rank][k], none above `max_tokens`, loads as equal as may be.

    Longest-processing-time-first: each sample, the longest first, joins the micro-batch with the least tokens. A micro-batch
    is empty only when there are fewer samples than micro-batches.
    """
    assert not len(num_tokens) or num_tokens.max() <= max_tokens, "the config checks that each sample fits"
    rounds = max(1, -(-int(num_tokens.sum()) // (world_size * max_tokens)))
    while True:
        loads, members = _longest_first(num_tokens, world_size * rounds)
        if max(loads) <= max_tokens:
            break
        rounds += max(1, rounds // 64)  # by one alone, a step of 10,240 samples of a third of the budget takes minutes
    by_load = sorted(range(len(loads)), key=lambda m: (-loads[m], m))
    micro_batches: list[list[MicroBatchPlan]] = [[] for _ in range(world_size)]
    for place, number in enumerate(by_load):  # to and fro over the ranks, so that their sums are equal too
        lap, rank = divmod(place, world_size)
        rank = rank if lap % 2 == 0 else world_size - 1 - rank
        chosen = np.sort(slots[np.array(members[number], dtype=np.int64)])
        micro_batches[rank].append(MicroBatchPlan(chosen, int(loads[number])))
    return micro_batches


def _longest_first(num_tokens: np.ndarray, bins: int) -> tuple[list[int], list[list[int]]]:
    members: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, number) for number in range(bins)]
    for sample in np.argsort(-num_tokens, kind="stable"):
        load, number = heap[0]
        members[number].append(int(sample))
        heapq.heapreplace(heap, (load + int(num_tokens[sample]), number))
    loads = [0] * bins
    for load, number in heap:
        loads[number] = load
    return loads, members
