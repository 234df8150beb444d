"""Which items are masked."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ds.data.masking import masked_items, masked_spans, num_masked

KEYS = st.integers(0, 2**64 - 1)


def runs(masked: np.ndarray) -> np.ndarray:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], masked.astype(int), [0]])))
    return edges[1::2] - edges[::2]


@given(length=st.integers(0, 600), probability=st.floats(0.01, 0.99))
def test_the_count_is_exact(length: int, probability: float) -> None:
    expected = max(1, round(probability * length)) if length else 0
    assert num_masked(np.array([length]), probability)[0] == expected


def test_the_count_at_15_percent() -> None:
    lengths = np.array([0, 1, 2, 6, 7, 10, 20, 33, 100])
    assert num_masked(lengths, 0.15).tolist() == [0, 1, 1, 1, 1, 2, 3, 5, 15]


@given(length=st.integers(0, 100), share=st.floats(0, 1), key=KEYS)
def test_masked_items_are_exactly_so_many(length: int, share: float, key: int) -> None:
    count = int(share * length)
    masked = masked_items(length, count, key, 0)
    assert masked.shape == (length,) and masked.sum() == count
    assert (masked == masked_items(length, count, key, 0)).all()


def test_every_item_is_masked_equally_often() -> None:
    often = sum(masked_items(10, 3, key, 1).astype(int) for key in range(6000))
    assert np.abs(often / 6000 - 0.3).max() < 0.03


@given(length=st.integers(1, 120), count=st.integers(0, 120), span=st.integers(1, 12), key=KEYS)
@settings(max_examples=200)
def test_masked_spans_have_their_length(length: int, count: int, span: int, key: int) -> None:
    count = min(count, length)
    masked = masked_spans(length, count, span, key, 2)
    assert masked.shape == (length,) and masked.sum() == count
    if count < length:
        assert (runs(masked) < span).sum() <= 1 or span > length, "only the remainder is shorter than the span"


def test_every_item_can_be_in_a_span() -> None:
    often = sum(masked_spans(20, 3, 3, key, 2).astype(int) for key in range(2000))
    assert often.min() > 50 and np.abs(often[3:-3] / 2000 - 3 / 18).max() < 0.05
