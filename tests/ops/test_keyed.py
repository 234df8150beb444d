"""Hashes and permutations without state: every index once, well spread, equal for equal keys."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ds.ops.keyed import keyed_choice, keyed_hash, keyed_uniform, permute


@given(count=st.integers(1, 3000), key=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**41))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection(count: int, key: int, epoch: int) -> None:
    image = permute(np.arange(count), count, key, "order", epoch)
    assert (np.sort(image) == np.arange(count)).all()


@given(count=st.integers(2, 2**40), key=st.integers(0, 2**63 - 1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_permute_of_a_huge_range_stays_in_it_and_keeps_indices_apart(count: int, key: int, data: st.DataObject) -> None:
    index = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=50))))
    image = permute(index, count, key)
    assert image.min() >= 0 and image.max() < count
    assert len(np.unique(image)) == len(index)
    assert (permute(index[:1], count, key) == image[:1]).all(), "an image does not depend on what else is asked for"


def test_permute_takes_a_key_per_index() -> None:
    index = np.tile(np.arange(50), 2)
    epochs = np.repeat([7, 8], 50)
    together = permute(index, 50, 1, "order", epochs)
    assert (together[:50] == permute(np.arange(50), 50, 1, "order", 7)).all()
    assert (together[50:] == permute(np.arange(50), 50, 1, "order", 8)).all()
    assert (together[:50] != together[50:]).any()


def test_every_permutation_of_few_items_is_about_equally_likely() -> None:
    seeds = np.repeat(np.arange(12_000), 4)
    seen = permute(np.tile(np.arange(4), 12_000), 4, seeds, "order").reshape(-1, 4)
    _, counts = np.unique(seen, axis=0, return_counts=True)
    assert len(counts) == 24
    chi_squared = ((counts - 500.0) ** 2 / 500.0).sum()
    assert chi_squared < 60.0, "23 degrees of freedom: 60 is beyond 1 in 10,000"


def test_uniform_and_choice_are_uniform_and_independent() -> None:
    sample = np.arange(40_000)
    first, second = keyed_uniform(1, "drop", 0, sample), keyed_uniform(1, "drop", 1, sample)
    for values in (first, second):
        assert values.min() >= 0 and values.max() < 1
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        assert ((counts - 2000.0) ** 2 / 2000.0).sum() < 50.0
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    choices = np.bincount(keyed_choice(5, 9, sample), minlength=5)
    assert len(choices) == 5 and ((choices - 8000.0) ** 2 / 8000.0).sum() < 25.0


def test_each_key_matters_and_so_does_its_place() -> None:
    values = [keyed_hash(*keys) for keys in ((1, 2), (2, 1), (1,), (1, 2, 0), ("ab", 1), ("ba", 1), (1, "ab"))]
    assert len({int(value) for value in values}) == len(values)
    flipped = [bin(int(keyed_hash(5, 1 << bit) ^ keyed_hash(5, 0))).count("1") for bit in range(64)]
    assert 24 < np.mean(flipped) < 40 and min(flipped) > 10, "one bit of a key changes about half the bits of the hash"
