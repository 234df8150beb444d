"""Micro-batches: a step's samples, distributed over ranks and accumulation rounds.

Their cost is balanced, and none exceeds the token budget.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opt_ds.ops.plan_operators import as_tensor, plan_operators

_TRIES = 64  # number of micro-batches that are tried for a sample, cheapest first


@dataclass(frozen=True)
class MicroBatchPlan:
    """Global sample indices of the samples in one forward and backward pass."""

    indices: np.ndarray  # int64, ascending
    num_tokens: int
    cost: float  # operations, or the costs passed to `distribute`


class MicroBatches(Sequence[list[MicroBatchPlan]]):
    """Micro-batches of each rank, [rank][k], the same number on every rank. Those of a rank are created on access."""

    def __init__(self, indices: np.ndarray, sizes: np.ndarray, num_tokens: np.ndarray, costs: np.ndarray) -> None:
        """Store the result of `distribute`.

        Args:
            indices: int64 [n], global sample indices by rank and micro-batch; ascending within each micro-batch.
            sizes: int64 [ranks, k], samples per micro-batch.
            num_tokens: int64 [ranks, k].
            costs: float64 [ranks, k].
        """
        self.indices, self.sizes, self.num_tokens, self.costs = indices, sizes, num_tokens, costs
        self._ends = np.cumsum(sizes).reshape(sizes.shape)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, rank: int) -> list[MicroBatchPlan]:  # type: ignore[override]  # slices are not supported
        sizes, ends = self.sizes[rank].tolist(), self._ends[rank].tolist()
        own = zip(sizes, ends, self.num_tokens[rank].tolist(), self.costs[rank].tolist(), strict=True)
        return [MicroBatchPlan(self.indices[end - size : end], tokens, cost) for size, end, tokens, cost in own]

    def followed_by(self, others: "MicroBatches") -> "MicroBatches":
        """Return each rank's micro-batches, followed by those of `others` for the same number of ranks."""
        indices = [part for rank in range(len(self)) for part in (self._indices_of(rank), others._indices_of(rank))]
        joined = [
            np.concatenate(pair, axis=1)
            for pair in ((self.sizes, others.sizes), (self.num_tokens, others.num_tokens), (self.costs, others.costs))
        ]
        return MicroBatches(np.concatenate(indices), *joined)

    def _indices_of(self, rank: int) -> np.ndarray:
        end = int(self._ends[rank, -1])
        return self.indices[end - int(self.sizes[rank].sum()) : end]

    @property
    def loads(self) -> np.ndarray:
        """Total cost of each rank's micro-batches, added in order, float64 [ranks]."""
        return np.add.accumulate(self.costs, axis=1)[:, -1]


def distribute(
    indices: np.ndarray,
    num_tokens: np.ndarray,
    world_size: int,
    max_tokens: int,
    costs: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> MicroBatches:
    """Distribute samples over the same number of micro-batches per rank, with costs as equal as possible.

    Both the ranks' total costs and the costs of the ranks' k-th micro-batches are balanced. The algorithm is
    longest-processing-time-first: each sample, most expensive first, joins the cheapest micro-batch that has room for
    it. A micro-batch is empty only if there are fewer samples than micro-batches.

    Args:
        indices: int64 [n], global sample indices, ascending.
        num_tokens: int64 [n], tokens of each sample.
        world_size: Number of ranks.
        max_tokens: Token budget of a micro-batch.
        costs: float64 [n], non-negative costs. None: the tokens.
        groups: int64 [n]. Samples of one group >= 0 are in one micro-batch; -1: the sample is in no group. None: there are
            no groups.

    Returns:
        The micro-batches.
    """
    if groups is not None and (groups >= 0).any():
        return _distribute_groups(indices, num_tokens, world_size, max_tokens, costs, groups)
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
        indices[members].astype(np.int64, copy=False),
        sizes.reshape(by_rank),
        tokens.reshape(by_rank),
        sums.reshape(by_rank),
    )


def _distribute_groups(
    indices: np.ndarray,
    num_tokens: np.ndarray,
    world_size: int,
    max_tokens: int,
    costs: np.ndarray | None,
    groups: np.ndarray,
) -> MicroBatches:
    """Distribute groups as `distribute` distributes samples. A sample of no group is a group of one."""
    costs = num_tokens.astype(np.float64) if costs is None else costs
    own = np.where(groups >= 0, groups, -1 - np.arange(len(groups)))
    _, first, inverse = np.unique(own, return_index=True, return_inverse=True)
    by_first = np.argsort(first)  # groups in the order of their first samples
    unit = np.argsort(by_first)[inverse.reshape(-1)]
    count = len(by_first)
    found = distribute(
        np.arange(count),
        np.bincount(unit, num_tokens, count).astype(np.int64),
        world_size,
        max_tokens,
        np.bincount(unit, costs, count),
    )
    place_of_unit = np.empty(count, np.int64)
    place_of_unit[found.indices] = np.repeat(np.arange(found.sizes.size), found.sizes.reshape(-1))
    place = place_of_unit[unit]
    sizes = np.bincount(place, minlength=found.sizes.size).reshape(found.sizes.shape)
    order = np.argsort(place, kind="stable")
    return MicroBatches(indices[order].astype(np.int64, copy=False), sizes, found.num_tokens, found.costs)


def _distribute_in_numpy(
    num_tokens: np.ndarray, costs: np.ndarray, world_size: int, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the samples' indices in the order [rank][k], and the size, tokens and cost of each micro-batch."""
    order = np.argsort(-costs, kind="stable")
    rounds = max(1, -(-int(num_tokens.sum()) // (world_size * max_tokens)))
    while (assigned := _assign(num_tokens[order], costs[order], world_size * rounds, max_tokens)) is None:
        # Adding one round at a time would take minutes for 10,240 samples of a third of the budget each.
        rounds += max(1, rounds // 64)
    bins = world_size * rounds
    sums = _sums(costs[order], assigned, bins)
    lap, rank = np.divmod(np.arange(bins), world_size)
    # Alternate the direction over the ranks, so that their sums are balanced too.
    rank = np.where(lap % 2 == 0, rank, world_size - 1 - rank)
    dearest_first = np.argsort(-sums, kind="stable")
    place_of_bin = np.empty(bins, np.int64)  # micro-batch -> its index in [rank][k]
    place_of_bin[dearest_first] = rank * rounds + lap
    place_of = np.empty(len(costs), np.int64)
    place_of[order] = place_of_bin[assigned]
    sizes = np.bincount(place_of, minlength=bins)
    tokens = np.bincount(place_of, num_tokens, minlength=bins).astype(np.int64)
    return np.argsort(place_of, kind="stable"), sizes, tokens, sums[np.argsort(place_of_bin)]


def _sums(costs: np.ndarray, assigned: np.ndarray, bins: int) -> np.ndarray:
    """Return float64 [bins] with the same bits as `np.sum` over each micro-batch's costs in their order."""
    ordered = costs[np.argsort(assigned, kind="stable")]
    ends = np.cumsum(np.bincount(assigned, minlength=bins)).tolist()
    return np.array([ordered[start:end].sum() for start, end in zip([0, *ends[:-1]], ends, strict=True)])


def _assign(num_tokens: np.ndarray, costs: np.ndarray, bins: int, max_tokens: int) -> np.ndarray | None:
    """Return the micro-batch of each sample in the given order, int64 [n], or None if a sample does not fit."""
    assigned = np.empty(len(costs), dtype=np.int64)
    tokens = [0] * bins
    heap = [(0.0, number) for number in range(bins)]
    least = np.minimum.accumulate(num_tokens[::-1])[::-1]  # minimum over this sample and all later ones
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
            if tokens[number] + smallest <= max_tokens:  # otherwise no later sample fits either
                full.append((cost, number))
        else:
            return None
        for item in full:
            heapq.heappush(heap, item)
    return assigned
