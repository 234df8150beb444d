"""Test the linear probe: perfect if [CLS] determines the label, chance otherwise, and equal to scikit-learn's mAP."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

import opt_ds.evaluation.classification as module
from opt_ds.errors import UserError
from opt_ds.evaluation.classification import classification, classification_lines
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator


@pytest.fixture
def labelled(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Assigns labels by the sample's number, and a [CLS] that reveals them from text alone."""
    names = ["even", "third", "rare"]
    labels = {i: [n for n, has in zip(names, (i % 2 == 0, i % 3 == 0, i == 0), strict=True) if has] for i in range(60)}
    monkeypatch.setattr(evaluator.store, "labels", labels.__getitem__)
    description = evaluator.store.description.model_copy(update={"label_names": names})
    monkeypatch.setattr(evaluator.store, "description", description)
    noise = np.random.default_rng(0)

    def cls(_: Evaluator, samples: np.ndarray, subset: str) -> np.ndarray:
        told = np.array([[i % 2 == 0, i % 3 == 0] for i in samples], dtype=np.float32)
        return told if "T" in subset else noise.normal(size=told.shape).astype(np.float32)

    monkeypatch.setattr(module, "_cls", cls)
    return labels


def test_the_probe_finds_what_is_there_and_nothing_else(evaluator: Evaluator, labelled: dict[str, Any]) -> None:
    figures = classification(evaluator, "valid", subsets=("T", "A"), min_positives=5)
    assert figures["labels"] == 2, "a label of one sample does not count"
    assert figures["subsets"]["T"]["mAP"] == 1.0 and figures["subsets"]["T"]["labels_not_converged"] == 0
    assert figures["subsets"]["A"]["mAP"] < 0.95
    assert set(figures["subsets"]["T"]["average_precision"]) == {"even", "third"}
    lines = classification_lines(figures)
    assert any("100.0%" in line for line in lines) and any("chance" in line for line in lines)
    assert any("untrained encoder, probe" in line for line in lines)


def test_map_is_scikit_learns(evaluator: Evaluator, labelled: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    kept: dict[str, np.ndarray] = {}

    def probe(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, _: float) -> tuple[np.ndarray, int]:
        kept["scores"] = random.normal(size=(len(x_test), y_train.shape[1]))
        return kept["scores"], 0

    monkeypatch.setattr(module, "_probe", probe)
    figures = classification(evaluator, "valid", subsets=("A",), min_positives=5, with_untrained=False)
    assert set(figures["subsets"]["A"]["figures"]["mAP"]["controls"]) == {"chance"}
    test = evaluator.samples_with("valid", (0, 1, 2))
    truth = np.array([[i % 2 == 0, i % 3 == 0] for i in test])
    assert figures["subsets"]["A"]["mAP"] == pytest.approx(average_precision_score(truth, kept["scores"], average="macro"))
    assert figures["chance"] == pytest.approx(truth.mean(0).mean())
    low, high = figures["subsets"]["A"]["figures"]["mAP"]["interval"]
    assert low < figures["subsets"]["A"]["mAP"] < high


def test_map_of_counted_samples_is_scikit_learns_with_weights() -> None:
    random = np.random.default_rng(0)
    truth, scores = random.random((40, 3)) < 0.4, random.integers(0, 6, (40, 3)).astype(float)  # with ties
    times = random.integers(0, 4, (5, 40)).astype(float)
    found = module._mean_average_precision(truth, scores).counted(times)
    for row, value in zip(times, found, strict=True):
        expected = [average_precision_score(truth[:, c], scores[:, c], sample_weight=row) for c in range(3)]
        assert value == pytest.approx(np.mean(expected))


def test_all_seven_subsets_of_a_real_model_are_judged_on_the_same_samples(
    evaluator: Evaluator, labelled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(evaluator.store, "labels", labelled.__getitem__)
    description = evaluator.store.description.model_copy(update={"label_names": ["even", "third", "rare"]})
    monkeypatch.setattr(evaluator.store, "description", description)
    figures = classification(evaluator, "valid", min_positives=5)
    assert list(figures["subsets"]) == list(SUBSETS)
    assert all(0 <= row["mAP"] <= 1 for row in figures["subsets"].values())


def test_without_audio_files_the_subsets_of_text_and_image_are_judged(
    without_audio: Evaluator, labelled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(without_audio.store, "labels", labelled.__getitem__)
    description = without_audio.store.description.model_copy(update={"label_names": ["even", "third", "rare"]})
    monkeypatch.setattr(without_audio.store, "description", description)
    figures = classification(without_audio, "valid", min_positives=5)
    assert list(figures["subsets"]) == [name for name in SUBSETS if "A" not in name]


def test_a_store_without_labels_is_refused(evaluator: Evaluator) -> None:
    with pytest.raises(UserError, match="prepare the store with `labels`"):
        classification(evaluator, "valid", min_positives=10**6)
