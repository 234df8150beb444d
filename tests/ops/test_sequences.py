"""Packed sequences: padding and packing are each other's inverse, and padding is marked."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from opt_ds.ops.sequences import Sequences

LENGTHS = st.lists(st.integers(0, 9), max_size=12)


@given(lengths=LENGTHS)
def test_pack_undoes_pad(lengths: list[int]) -> None:
    sequences = Sequences.from_lengths(lengths)
    rows = torch.arange(sum(lengths) * 3, dtype=torch.float32).reshape(-1, 3)
    padded = sequences.pad(rows) if lengths and sum(lengths) else None
    if padded is not None:
        assert padded.shape == (len(lengths), max(lengths), 3)
        assert torch.equal(sequences.pack(padded), rows)
        for sequence, own in zip(padded, torch.split(rows, lengths), strict=True):
            assert torch.equal(sequence[: len(own)], own)


@given(lengths=LENGTHS)
def test_what_a_kernel_reads_of_it(lengths: list[int]) -> None:
    sequences = Sequences.from_lengths(lengths)
    assert len(sequences) == len(lengths) and sequences.total == sum(lengths)
    assert sequences.cu_seqlens.dtype == torch.int32
    assert torch.diff(sequences.cu_seqlens).tolist() == lengths == sequences.lengths.tolist()
    if lengths:
        assert (sequences.min_length, sequences.max_length) == (min(lengths), max(lengths))
        assert sequences.valid.sum(1).tolist() == lengths


def test_sequences_of_nothing() -> None:
    none, empty = Sequences.from_lengths([]), Sequences.from_lengths([0, 0])
    assert len(none) == 0 and none.total == none.max_length == 0
    assert len(empty) == 2 and empty.pad(torch.zeros(0, 4)).shape == (2, 0, 4)
    assert empty.pack(torch.zeros(2, 0, 4)).shape == (0, 4)
