"""Test counts in context: probabilities sum to 1, they learn what neighbours tell, and fall back where they know nothing."""

import numpy as np
import pytest

from opt_ds.tasks.context_counts import (
    ContextCounts,
    class_contexts,
    code_contexts,
    code_positions,
    joined_chains,
    neighbour_contexts,
    token_contexts,
)

SIZE = 8


def codes_like_neighbours(images: int, seed: int) -> np.ndarray:
    """4 x 4 codes: the one above with probability 0.6, the left one with 0.3, otherwise random."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, SIZE, (images, 4, 4))
    for i in range(1, 4):
        for j in range(1, 4):
            choice = random.random(images)
            above, left, other = codes[:, i - 1, j], codes[:, i, j - 1], codes[:, i, j]
            codes[:, i, j] = np.where(choice < 0.6, above, np.where(choice < 0.9, left, other))
    return codes.reshape(images, 16)


def test_neighbours_tell_what_frequencies_and_positions_do_not() -> None:
    train, test = codes_like_neighbours(2000, 0), codes_like_neighbours(200, 1)
    symbols, wanted = train.reshape(-1), test.reshape(-1)
    frequencies = ContextCounts([[]], symbols, SIZE).bits([[]], wanted).mean()
    positions = ContextCounts(code_positions(train), symbols, SIZE).bits(code_positions(test), wanted).mean()
    in_context = ContextCounts(code_contexts(train, SIZE), symbols, SIZE)
    contexts = in_context.bits(code_contexts(test, SIZE), wanted).reshape(-1, 4, 4)
    assert frequencies == pytest.approx(3, abs=0.02) and positions == pytest.approx(3, abs=0.05)
    # Entropy where both neighbours are other codes: 0.6, 0.3, and 0.1 over all.
    p = np.array([0.6125, 0.3125, *[0.0125] * 6])
    assert contexts[:, 1:, 1:].mean() < 1.1 * -(p * np.log2(p)).sum() and contexts[:, 0].mean() == pytest.approx(3, abs=0.1)
    right = in_context.most_likely(code_contexts(test, SIZE), test.size) == wanted
    assert right.reshape(-1, 4, 4)[:, 1:, 1:].mean() > 0.55


def test_positions_tell_where_codes_have_their_places() -> None:
    train = np.tile(np.arange(16) % SIZE, (50, 1))
    model = ContextCounts(code_positions(train), train.reshape(-1), SIZE)
    assert model.bits(code_positions(train), train.reshape(-1)).max() < 0.1
    assert (model.most_likely(code_positions(train), train.size) == train.reshape(-1)).all()


def test_probabilities_sum_to_one_in_known_and_unknown_contexts() -> None:
    train = codes_like_neighbours(100, 0)
    model = ContextCounts(code_contexts(train, SIZE), train.reshape(-1), SIZE)
    for place in (0, 5, 15):
        contexts = [[np.full(SIZE, level[place]) for level in chain] for chain in code_contexts(train[:1], SIZE)]
        assert model.probabilities(contexts, np.arange(SIZE)).sum() == pytest.approx(1)
    unknown = [[np.full(SIZE, 10**9)] * 3, [np.full(SIZE, 10**9)] * 3]
    assert model.probabilities(unknown, np.arange(SIZE)).sum() == pytest.approx(1)


def test_contexts_that_tell_nothing_cost_next_to_nothing() -> None:
    """Leave-one-out chooses the back-off: counts of noise must not be trusted."""
    random = np.random.default_rng(0)
    symbols, wanted = random.integers(0, SIZE, 2000), random.integers(0, SIZE, 2000)
    noise = [[random.integers(0, 1000, 2000)]]
    model = ContextCounts(noise, symbols, SIZE)
    assert model.bits([[random.integers(0, 1000, 2000)]], wanted).mean() == pytest.approx(3, abs=0.02)


def test_without_counted_items_all_are_equally_likely() -> None:
    empty = np.empty((0, 16), np.int64)
    model = ContextCounts(code_contexts(empty, SIZE), empty.reshape(-1), SIZE)
    test = codes_like_neighbours(2, 0)
    assert model.bits(code_contexts(test, SIZE), test.reshape(-1)) == pytest.approx(np.full(32, 3.0))
    assert len(model.most_likely(code_contexts(test, SIZE), 32)) == 32


def test_contexts_are_the_neighbours() -> None:
    codes = np.arange(16)[None] % SIZE
    (by_left, by_both) = code_contexts(codes, SIZE)
    assert by_both[0][5] == codes[0, 4] and by_both[1][5] == codes[0, 4] * 9 + codes[0, 1]
    assert by_both[0][4] == SIZE and by_both[1][0] == SIZE * 9 + SIZE, "the border is a symbol of its own"
    assert by_left[0][5] == 5
    before, position = token_contexts(np.array([3, 1, 2]), SIZE)
    assert before[0].tolist() == [8, 3, 1] and before[1].tolist() == [8 * 9 + 8, 3 * 9 + 8, 1 * 9 + 3]
    assert position[0].tolist() == [0, 1, 2]
    left, right = neighbour_contexts(np.array([3, 1, 2]), np.array([0, 1]), SIZE)
    assert left[0].tolist() == [8, 3] and right[0].tolist() == [1, 2] and left[1].tolist() == [8 * 9 + 1, 3 * 9 + 2]
    most, place = class_contexts(np.array([2, 2, 1]), None, SIZE)
    assert most[0].tolist() == [1, 1, 2] and place[0].tolist() == [0, 1, 2]  # of equally frequent ones the first
    most, place = class_contexts(np.array([2, 1, 1, 5]), np.array([True, False, False, True]), SIZE)
    assert most[0].tolist() == [1, 1] and place[0].tolist() == [0, 3]
    assert class_contexts(np.array([2]), None, SIZE)[0][0].tolist() == [SIZE]
    assert joined_chains([code_positions(codes)] * 2, (1,))[0][0].tolist() == [*range(16)] * 2
