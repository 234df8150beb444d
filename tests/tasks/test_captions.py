"""Negatives of captions: plausible exchanges of whole words, never a true caption, as long as the caption, repeatable."""

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
    """Captions of two objects in every order, with colours; "strawberry" has two pieces."""
    names = [name if name != "straw" else "strawberry" for name in OBJECTS]
    return [
        f"a {COLOURS[(i + j) % 3]} {one} {('left', 'right')[(i + j) % 2]} of a {COLOURS[(i + 2 * j) % 3]} {other}"
        for i, one in enumerate(names)
        for j, other in enumerate(names)
        if i != j
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return captioned_store(tmp_path_factory.mktemp("captions") / "store", scenes(), PIECES)


def test_a_swap_exchanges_whole_words_that_fit_in_each_others_place(store: FeatureStore) -> None:
    captions, found = captions_of(store, "train", 20), []
    other = store.text(0).astype(np.int64)
    for row in range(len(store.lengths("text"))):
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
    assert np.mean(alike) > 0.95, "objects change places with objects and colours with colours"
    assert any("strawberry" in pair for pair in found) and any(pair <= colours for pair in found)


def test_a_replacement_is_a_word_of_the_other_caption_that_fits(store: FeatureStore) -> None:
    captions, kinds = captions_of(store, "train", 20), []
    for row in range(len(store.lengths("text"))):
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
    assert np.mean(alike) > 0.95 and len(set(kinds)) > 10


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


def test_neighbours_are_those_of_the_training_split(tmp_path: Path) -> None:
    store = captioned_store(tmp_path / "s", ["a cat", "a dog", "the tree"], ("a", "the", *OBJECTS), num_valid=1)
    captions = captions_of(store, "train", 20)
    word = {text: captions._words(store.text(row).astype(np.int64), np.array([2])).hashes for row, text in enumerate("xyz")}
    (a, cat), (_, dog), (the, tree) = word["x"], word["y"], word["z"]
    edge = np.uint64(0)
    left, right = np.array([a, a, edge, cat, the, a, cat]), np.array([cat, dog, a, edge, tree, tree, a])
    assert captions._are_neighbours(left, right).tolist() == [True, True, True, True, False, False, False]
