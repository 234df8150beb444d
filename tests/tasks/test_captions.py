"""Negatives of captions: plausible exchanges of whole words, never a true caption, as long as the caption, repeatable."""

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from opt_ds.store import FeatureStore
from opt_ds.tasks.captions import REPLACE, SWAP, captions_of
from tests.captioned import captioned_store, words_of

OBJECTS = ("cat", "dog", "car", "straw", "tree", "apple")
PIECES = ("a", "on", "left", "right", "of", *OBJECTS, "##berry", "red", "blue", "green")
COLOURS = ("red", "blue", "green")


def scenes() -> list[str]:
    """Captions of two objects in every order, with every pair of colours; "strawberry" has two pieces."""
    names = [name if name != "straw" else "strawberry" for name in OBJECTS]
    return [
        f"a {colour} {one} {side} of a {another} {other}"
        for one, other in permutations(names, 2)
        for colour, another in product(COLOURS, COLOURS)
        for side in ("left", "right")
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return captioned_store(tmp_path_factory.mktemp("captions") / "store", scenes(), PIECES)


def test_a_swap_exchanges_whole_words_that_fit_in_each_others_place(store: FeatureStore) -> None:
    captions, found = captions_of(store, "train", 20), []
    other = store.text(0).astype(np.int64)
    for row in range(0, len(store.lengths("text")), 11):
        ids = store.text(row).astype(np.int64)
        for key in range(8):
            negative = captions.negative(ids, other, SWAP, row, key)
            assert len(negative) == len(ids) and sorted(negative) == sorted(ids) and (negative != ids).any()
            assert not captions.is_true(row, negative)
            one, two = store.caption(row).split(), words_of(store, negative).split()
            changed = [place for place in range(len(one)) if one[place] != two[place]]
            assert len(changed) == 2 and [one[i] for i in changed] == [two[i] for i in reversed(changed)]
            found.append({one[i] for i in changed})
    objects, colours = {*OBJECTS, "strawberry"}, set(COLOURS)
    alike = [pair <= objects or pair <= colours for pair in found]
    assert all(alike), "objects change places with objects and colours with colours"
    assert any("strawberry" in pair for pair in found) and any(pair <= colours for pair in found)


def test_a_replacement_is_a_word_of_the_other_caption_that_fits(store: FeatureStore) -> None:
    captions, kinds = captions_of(store, "train", 20), []
    for row in range(0, len(store.lengths("text")), 7):
        other = store.text((7 * row + 3) % len(store.lengths("text"))).astype(np.int64)
        ids = store.text(row).astype(np.int64)
        if np.array_equal(other, ids):
            continue
        negative = captions.negative(ids, other, REPLACE, row, 5)
        assert len(negative) == len(ids) and not captions.is_true(row, negative)
        one, two = store.caption(row).split(), words_of(store, negative).split()
        changed = [place for place in range(len(one)) if one[place] != two[place]]
        assert len(changed) == 1 and two[changed[0]] in words_of(store, other).split()
        kinds.append((one[changed[0]], two[changed[0]]))
    alike = [any({before, after} <= kind for kind in (set(OBJECTS), set(COLOURS), {"left", "right"})) for before, after in kinds]
    assert all(alike) and len(set(kinds)) > 10


def test_the_negative_is_a_function_of_its_key(store: FeatureStore) -> None:
    captions, again = captions_of(store, "train", 20), captions_of.__wrapped__(store, "train", 20)
    ids, other = (store.text(row).astype(np.int64) for row in (4, 11))
    for exchange in (SWAP, REPLACE):
        made = [captions.negative(ids, other, exchange, 4, key) for key in range(20)]
        assert all((again.negative(ids, other, exchange, 4, key) == made[key]).all() for key in range(20))
        assert len({negative.tobytes() for negative in made}) > 1


def test_a_true_caption_of_the_group_is_no_negative(tmp_path: Path) -> None:
    """Both orders are true of the first image: what remains is another exchange."""
    texts = ["a cat and a dog", "a dog and a cat", "a car and a tree", "a tree and a car", "a cat and a tree", "a dog and a car"]
    store = captioned_store(tmp_path / "s", texts, ("a", "and", *OBJECTS), groups=[0, 0, 1, 1, 2, 3])
    captions = captions_of(store, "train", 20)
    ids, other = (store.text(row).astype(np.int64) for row in (0, 2))
    assert captions.is_true(0, store.text(1).astype(np.int64)) and captions.is_true(1, ids) and not captions.is_true(2, ids)
    assert captions.are_true(np.array([0, 0, 0, 4]), np.array([0, 1, 2, 0])).tolist() == [True, True, False, False]
    for key in range(30):
        for exchange in (SWAP, REPLACE):
            negative = words_of(store, captions.negative(ids, other, exchange, 0, key))
            assert negative not in texts[:2]


@pytest.mark.parametrize("exchange", [SWAP, REPLACE])
def test_a_caption_without_two_words_is_changed_all_the_same(tmp_path: Path, exchange: int) -> None:
    texts = ["cat", "dog", "cat cat", "strawberry", "tree"]
    store = captioned_store(tmp_path / "s", texts, PIECES)
    captions = captions_of(store, "train", 20)
    assert (captions.num_captions, captions.num_without_swap) == (5, 5)
    for row in range(len(texts)):
        for other in range(len(texts)):
            ids, words = store.text(row).astype(np.int64), store.text(other).astype(np.int64)
            negative = captions.negative(ids, words, exchange, row, 3)
            assert len(negative) == len(ids) and (negative != ids).any()
            assert negative.min() >= 5, "no special token"


def test_texts_are_compared_as_the_model_reads_them(tmp_path: Path) -> None:
    """Captions that differ only behind the limit are the same caption."""
    texts = ["a cat left of a dog", "a cat left of a tree", "a car"]
    store = captioned_store(tmp_path / "s", texts, PIECES, groups=[0, 1, 2])
    rows, sample = np.array([0, 1]), np.array([1, 0])
    assert captions_of(store, "train", 5).are_true(sample, rows).tolist() == [True, True]
    assert captions_of(store, "train", 6).are_true(sample, rows).tolist() == [False, False]


def test_runs_of_words_are_those_of_the_training_split(tmp_path: Path) -> None:
    """A swap within an adjective's reach: only the plural that follows its number is plausible."""
    train = ["two red cats", "a red cat", "two red dogs", "a red dog", "a blue cat", "two blue dogs"]
    pieces = ("a", "two", "red", "blue", "cat", "cats", "dog", "dogs", "and")
    store = captioned_store(tmp_path / "s", [*train, "two red dog"], pieces, num_valid=1)
    captions, ids = captions_of(store, "train", 20), store.text(0).astype(np.int64)
    for row, expected in ((1, set()), (3, set()), (2, {"two red dogs"}), (5, {"two blue cats", "two red dogs"})):
        edits = captions._replacements(ids, captions._words(ids, np.array([3])), store.text(row).astype(np.int64), 1)
        assert {words_of(store, changed) for cost, changed in edits if not cost} == expected - {"two blue cats"}
        assert all(cost for cost, changed in edits if words_of(store, changed) in ("a red cats", "two red cat", "two red dog"))


def test_if_no_swap_is_plausible_a_word_is_replaced(tmp_path: Path) -> None:
    texts = ["red cats", "red dogs", "blue cats", "blue dogs"]
    store = captioned_store(tmp_path / "s", texts, ("red", "blue", "cats", "dogs"))
    captions = captions_of(store, "train", 20)
    assert words_of(store, captions.negative(store.text(0).astype(np.int64), store.text(3), SWAP, 0, 2)) in texts[1:3]
