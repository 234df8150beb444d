"""Grouped padding: every packed row has its place, little is padded, and what a group pads is marked."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from opt_ds.ops.padded_groups import PaddedGroups, rounded_length
from opt_ds.ops.sequences import Sequences

PAIRS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=20)


@given(pairs=PAIRS, few_shapes=st.booleans())
def test_every_packed_row_comes_back_from_its_place(pairs: list[tuple[int, int]], few_shapes: bool) -> None:
    queries, keys = (Sequences.from_lengths([pair[side] for pair in pairs]) for side in (0, 1))
    if not queries.total:
        return
    layout = PaddedGroups.of(queries, keys, few_shapes)
    rows = torch.arange(queries.total)
    assert torch.equal(rows[layout.query_rows][layout.place_of_row], rows)
    assert sum(layout.query_sizes) == len(layout.query_rows) and sum(layout.key_sizes) == len(layout.key_rows)
    used = sum(q > 0 for q, _ in pairs)
    assert used <= sum(group.num_sequences for group in layout.groups) <= len(pairs)


@given(pairs=PAIRS, few_shapes=st.booleans())
def test_a_group_reads_the_keys_of_its_sequences_and_no_others(pairs: list[tuple[int, int]], few_shapes: bool) -> None:
    queries, keys = (Sequences.from_lengths([pair[side] + 1 for pair in pairs]) for side in (0, 1))
    layout = PaddedGroups.of(queries, keys, few_shapes)
    sequence_of_key = torch.repeat_interleave(torch.arange(len(pairs)), keys.lengths)
    sequence_of_query = torch.repeat_interleave(torch.arange(len(pairs)), queries.lengths)
    parts = zip(layout.query_rows.split(layout.query_sizes), layout.key_rows.split(layout.key_sizes), layout.groups, strict=True)
    for query_rows, key_rows, group in parts:
        owners = sequence_of_query[query_rows.unflatten(0, (group.num_sequences, -1))[:, 0]]
        key_rows = key_rows.unflatten(0, (group.num_sequences, -1))
        seen = torch.ones_like(key_rows, dtype=torch.bool) if group.key_bias is None else group.key_bias[:, 0] == 0
        assert torch.equal(seen.sum(1), keys.lengths[owners])
        assert (sequence_of_key[key_rows] == owners[:, None])[seen].all()


def test_samples_of_46_to_190_positions_cost_little_more_than_they_need() -> None:
    lengths = np.random.default_rng(0).integers(46, 191, 64)
    sequences = Sequences.from_lengths(lengths)
    layout = PaddedGroups.of(sequences, sequences)
    computed = sum(size**2 // group.num_sequences for size, group in zip(layout.query_sizes, layout.groups, strict=True))
    needed = int(np.square(lengths).sum())
    assert computed < 1.15 * needed
    assert 2 * needed < 64 * 190**2, "what padding to the longest would cost"


def test_few_shapes_come_again_in_other_micro_batches() -> None:
    def lengths(seed: int) -> set[int]:
        sequences = Sequences.from_lengths(np.random.default_rng(seed).integers(46, 191, 200))
        layout = PaddedGroups.of(sequences, sequences, few_shapes=True)
        return {size // group.num_sequences for size, group in zip(layout.query_sizes, layout.groups, strict=True)}

    seen = lengths(0)
    assert all(length % 16 == 0 for length in seen) and all(lengths(seed) == seen for seed in (1, 2))
    sequences = Sequences.from_lengths([100, 110])
    assert PaddedGroups.of(sequences, sequences, few_shapes=True).query_sizes == [2 * 112]
    assert PaddedGroups.of(sequences, sequences).query_sizes == [2 * 110], "both are kept apart"


def test_lengths_are_rounded_up_a_little() -> None:
    lengths = np.arange(1, 1000)
    rounded = rounded_length(lengths)
    assert (rounded >= lengths).all() and (rounded - lengths < np.maximum(16, lengths / 4)).all()
    assert len(np.unique(rounded)) <= 33
