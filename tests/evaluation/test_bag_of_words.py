"""Test the bag of words: it finds a wrong object where the input tells the words, and never the order of the words."""


import numpy as np
import pytest

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.evaluation.bag_of_words import BagOfWords, fit_bag_of_words
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.scene_negatives import _tokens, preferences
from opt_ds.scenes.records import SceneRecord
from opt_ds.scenes.sampling import COMPOSITION, TRAIN
from opt_ds.scenes.vocabulary import KINDS
from opt_ds.store import FeatureStore
from tests.evaluation.scene_store import make_records, open_model, write_store
from tests.tiny import masked

PLACE = {kind: number for number, kind in enumerate(KINDS)}


def objects(record: SceneRecord) -> np.ndarray:
    """What an image shows: which kinds there are, and not where."""
    return np.eye(len(PLACE))[[PLACE[group.kind] for group in record.scene.graph.groups]].sum(0)


@pytest.fixture(scope="module")
def records() -> list[SceneRecord]:
    return make_records({TRAIN: 300, COMPOSITION: 24})


@pytest.fixture(scope="module")
def seeing(records: list[SceneRecord], tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    path = tmp_path_factory.mktemp("bag") / "store"
    write_store(path, records, drawn=False, coded=False, region=objects, width=len(PLACE))
    return open_model(FeatureStore(path))


def preferred(evaluator: Evaluator, records: list[SceneRecord], bag: BagOfWords) -> dict[str, float]:
    """Return kind of negative -> fraction that the true caption is preferred to."""
    known = {record.id: record for record in records}
    gallery = evaluator.store.split_samples(COMPOSITION)
    own = [known[evaluator.store.sample_id(int(index))] for index in gallery]
    texts = _tokens(evaluator, own)
    scores = bag.scores([evaluator.read(index, (bag.modality,)) for index in gallery], texts)
    parts = preferences(scores, texts, [list(record.negatives) for record in own])
    return {kind: won / count for kind, (won, count) in ((kind, counts.sum(0)) for kind, counts in parts.items())}


def test_it_knows_the_objects_and_neither_their_order_nor_their_colours(
    seeing: Evaluator, records: list[SceneRecord]
) -> None:
    bag = fit_bag_of_words(seeing, IMAGE, 1)
    assert bag is not None
    found = preferred(seeing, records, bag)
    assert found["object"] > 0.9
    assert found["swapped"] == 0.5, "exactly: the words are the same"
    assert 0.4 < found["colours"] < 0.6, "the same but for purple and violet"
    assert 0.2 < found["relation"] < 0.8


def test_of_an_input_that_tells_nothing_it_knows_what_is_frequent(
    seeing: Evaluator, records: list[SceneRecord]
) -> None:
    bag = fit_bag_of_words(seeing, AUDIO, 1)
    assert bag is not None
    found = preferred(seeing, records, bag)
    assert found["object"] < 0.8 and found["swapped"] == 0.5


def test_frequencies_are_those_of_words_and_add_up_to_one(seeing: Evaluator) -> None:
    bag = fit_bag_of_words(seeing, IMAGE, 1)
    assert bag is not None
    sample = seeing.read(int(seeing.store.split_samples(TRAIN)[0]), (TEXT, IMAGE))
    words = [np.array([number]) for number in range(seeing.store.description.dims.vocab_size)]
    scores = bag.scores([sample], [words])[0]
    assert np.exp(scores).sum() == pytest.approx(1)
    ids = sample.of(TEXT).ids
    assert bag.scores([sample], [[ids, ids[::-1]]])[0].tolist() == [scores[np.sort(ids)].sum()] * 2
    assert scores[np.unique(ids)].mean() > np.median(scores)
    assert bag.scores([], []) == []


def test_without_training_samples_there_is_none(seeing: Evaluator) -> None:
    blind = Evaluator(seeing.model, seeing.config, masked(seeing.store, IMAGE))
    assert fit_bag_of_words(blind, IMAGE, 1) is None
    assert fit_bag_of_words(blind, AUDIO, 1) is not None


def test_wide_features_are_projected(seeing: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opt_ds.evaluation.bag_of_words._WIDEST", 20)
    bag = fit_bag_of_words(seeing, IMAGE, 1)
    assert bag is not None and len(bag._regression.mean_e) == 20
    sample: Sample = seeing.read(int(seeing.store.split_samples(TRAIN)[0]), (TEXT, IMAGE))
    assert np.isfinite(bag.scores([sample], [[sample.of(TEXT).ids]])[0]).all()
