"""Test the controls: another sample's input is of another group and content; the untrained encoder is not the trained one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.evaluation.controls import another, derangement, other_samples, untrained, with_others
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.model.initial import initial_model
from opt_ds.store import FeatureStore
from tests.tiny import index_with


@pytest.mark.parametrize("sizes", [[1] * 20, [3, 3, 3], [5, 1, 1, 1, 1, 1], [10, 10], [2, 7, 5], [1, 1]])
def test_every_item_gets_one_of_another_class(sizes: list[int]) -> None:
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    for seed in range(20):
        places, others = derangement(classes, seed)
        assert (places == np.arange(len(classes))).all() and sorted(others) == list(places)
        assert (classes[others] != classes[places]).all()
        assert (derangement(classes, seed).others == others).all()
    assert any((derangement(classes, seed).others != others).any() for seed in range(20)) or len(classes) == 2


def test_a_class_of_more_than_half_leaves_some_without_another_one() -> None:
    classes = np.array([0] * 7 + [1, 2, 3])
    places, others = derangement(classes, 1)
    assert 0 < len(places) < 10 and (classes[others] != classes[places]).all()
    assert not len(derangement(np.zeros(5, int), 1).places) and not len(derangement(np.zeros(0, int), 1).places)
    assert not len(derangement(np.zeros(1, int), 1).places)


def test_the_other_sample_shares_no_group_caption_or_content(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(evaluator.store.path)
    gallery = evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), 8)
    rows = store.index.rows.copy()
    rows[gallery[1], IMAGE] = rows[gallery[0], IMAGE]  # the same image
    rows[gallery[3], TEXT] = rows[gallery[2], TEXT]  # the same text
    groups = store.groups.copy()
    groups[gallery[5]] = groups[gallery[4]]  # the same group
    store.__dict__["index"] = replace(index_with(store, rows), groups=groups)
    shared = Evaluator(evaluator.model, evaluator.config, store)
    real = Evaluator.caption
    monkeypatch.setattr(
        Evaluator, "caption", lambda self, index: "A red  cat!" if int(index) == gallery[6] else
        "a red cat" if int(index) == gallery[7] else real(self, index),
    )  # fmt: skip
    alike = {frozenset(pair) for pair in ((0, 1), (2, 3), (4, 5), (6, 7))}
    for seed in range(30):
        places, others = other_samples(shared, gallery, (IMAGE,), seed)
        assert len(places) == 8
        pairs = [frozenset(pair) for pair in zip(places.tolist(), others.tolist(), strict=True)]
        assert not any(pair in alike or len(pair) == 1 for pair in pairs)


def test_only_the_named_modality_is_another_sample_s(evaluator: Evaluator) -> None:
    gallery = evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), 6)
    others = other_samples(evaluator, gallery, (AUDIO, IMAGE), 1)
    for place, other, sample in zip(
        others.places, others.others, with_others(evaluator, gallery, (AUDIO, IMAGE), AUDIO, others), strict=True
    ):
        own, its = evaluator.read(gallery[place], (AUDIO, IMAGE)), evaluator.read(gallery[other], (AUDIO,))
        np.testing.assert_array_equal(sample.of(IMAGE).features, own.of(IMAGE).features)
        np.testing.assert_array_equal(sample.of(AUDIO).features, its.of(AUDIO).features)
    assert len(others.limited(3, 1).places) == 3
    assert [another(modality) for modality in (TEXT, IMAGE, AUDIO)] == ["another_text", "another_image", "another_audio"]


def test_the_untrained_encoder_is_the_runs_own_before_its_first_step(evaluator: Evaluator) -> None:
    state = torch.random.get_rng_state()
    other = untrained(evaluator)
    assert torch.equal(torch.random.get_rng_state(), state), "the control does not change what is sampled after it"
    expected = initial_model(evaluator.config, [evaluator.store]).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.model.state_dict().items())
    samples = [evaluator.read(index, (TEXT,)) for index in evaluator.samples_with("train", (TEXT,), 3)]
    assert np.abs(other.cls_vectors(samples) - evaluator.cls_vectors(samples)).max() > 1e-3
