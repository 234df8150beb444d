"""Spreading a step over ranks and micro-batches: each sample once, within the budget, equally many and equally full."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ds.data.micro_batches import distribute


@given(
    lengths=st.lists(st.integers(1, 100), max_size=80),
    world_size=st.integers(1, 5),
    budget=st.integers(100, 400),
)
@settings(max_examples=150, deadline=None)
def test_each_sample_once_within_the_budget_equally_many_per_rank(lengths: list[int], world_size: int, budget: int) -> None:
    indices, num_tokens = 3 * np.arange(len(lengths)), np.array(lengths, dtype=np.int64)
    ranks = distribute(indices, num_tokens, world_size, budget)
    assert len(ranks) == world_size and len({len(rank) for rank in ranks}) == 1
    every = [micro_batch for rank in ranks for micro_batch in rank]
    taken = np.concatenate([m.indices for m in every])
    assert sorted(taken) == indices.tolist()
    for m in every:
        assert m.num_tokens == num_tokens[m.indices // 3].sum() <= budget
        assert (np.diff(m.indices) > 0).all()
    empty = sum(len(m.indices) == 0 for m in every)
    assert empty == max(0, len(every) - len(lengths)), "none is empty while there are samples enough"
    assert len(ranks[0]) <= 1 + 2 * num_tokens.sum() // (world_size * budget), "no more rounds than half-full ones"


def test_ranks_carry_equal_loads() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 2000)
    for world_size in (2, 4, 7):
        ranks = distribute(np.arange(2000), lengths, world_size, 8192)
        loads = np.array([sum(m.num_tokens for m in rank) for rank in ranks])
        assert loads.max() / loads.mean() < 1.002
        sizes = np.array([m.num_tokens for rank in ranks for m in rank])
        assert sizes.max() - sizes.min() <= 300


def test_costs_are_balanced_where_tokens_are_not_what_costs() -> None:
    """Ranks' sums, and the micro-batches that run at the same time: waiting under 3 %."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(46, 191, 1024)
    costs = lengths * np.where(rng.random(1024) < 0.3, 2.5, 1.0) + lengths.astype(np.float64) ** 2 / 300
    for world_size in (2, 4, 8):
        assigned = {}
        for name, told in (("tokens", None), ("costs", costs)):
            ranks = distribute(np.arange(1024), lengths, world_size, 2048, told)
            assigned[name] = np.array([[costs[m.indices].sum() for m in rank] for rank in ranks])
        waiting = {name: 1 - found.sum() / (world_size * found.max(0).sum()) for name, found in assigned.items()}
        assert waiting["costs"] < 0.03 < waiting["tokens"]
        assert assigned["costs"].sum(1).max() / assigned["costs"].sum(1).mean() < 1.005


def test_the_result_is_a_function_of_the_arguments() -> None:
    lengths = np.random.default_rng(1).integers(1, 50, 300)
    first, second = (distribute(np.arange(300), lengths, 3, 500) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert [m.indices.tolist() for m in a] == [m.indices.tolist() for m in b]


def test_a_huge_step_of_samples_that_fill_badly_is_planned_quickly() -> None:
    lengths = np.random.default_rng(2).integers(70, 110, 10_240)
    start = time.process_time()
    ranks = distribute(np.arange(10_240), lengths, 2, 256)
    assert time.process_time() - start < 5.0
    assert len(ranks[0]) < 1.02 * 10_240 / 2 / 2, "two to a micro-batch"
