"""Test the mean average precision: that of scikit-learn, and that of a random order."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from opt_ds.evaluation import average_precision
from opt_ds.evaluation.average_precision import mean_average_precision, random_average_precision


@pytest.mark.parametrize("few", [0, 64], ids=["sorted", "products"])
def test_map_of_counted_samples_is_scikit_learns_with_weights(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average_precision, "_FEW", few)
    random = np.random.default_rng(0)
    truth, scores = random.random((40, 3)) < 0.4, random.integers(0, 6, (40, 3)).astype(float)  # with ties
    times = random.integers(0, 4, (5, 40)).astype(float)
    found = mean_average_precision(truth, scores).counted(times)
    for row, value in zip(times, found, strict=True):
        expected = [average_precision_score(truth[:, c], scores[:, c], sample_weight=row) for c in range(3)]
        assert value == pytest.approx(np.mean(expected))


def test_a_label_without_a_counted_sample_is_left_out_of_the_mean() -> None:
    truth = np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    scores = np.array([[0.9, 0.1], [0.5, 0.2], [0.1, 0.3]])
    assert mean_average_precision(truth, scores).value == pytest.approx((1 + 0.5) / 2)
    assert mean_average_precision(truth, scores).counted(np.array([[2.0, 0, 1]]))[0] == 1


@pytest.mark.parametrize("positives", [1, 2, 7, 30])
def test_a_random_order_has_the_expected_average_precision(positives: int) -> None:
    samples, random = 30, np.random.default_rng(positives)
    truth = np.arange(samples) < positives
    found = [average_precision_score(truth, random.random(samples)) for _ in range(400)]
    expected = random_average_precision(np.array([positives]), samples)[0]
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / 20 + 1e-12)
    assert expected == 1 if positives == samples else expected > positives / samples, "more than their share"
    assert random_average_precision(np.array([1]), 1)[0] == 1
