"""Test the mean average precision: that of scikit-learn, and that of a random order."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from opt_ds.evaluation.average_precision import mean_average_precision, random_average_precision
from opt_ds.evaluation.intervals import interval


def test_it_is_scikit_learns_with_ties_too() -> None:
    random = np.random.default_rng(0)
    truth = random.random((40, 5)) < 0.3
    for scores in (random.random((40, 5)), random.integers(0, 6, (40, 5)).astype(float), np.zeros((40, 5))):
        expected = average_precision_score(truth, scores, average="macro")
        assert mean_average_precision(truth, scores).value == pytest.approx(expected)


def test_a_label_without_a_drawn_sample_is_left_out_of_the_mean() -> None:
    truth = np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    scores = np.array([[0.9, 0.1], [0.5, 0.2], [0.1, 0.3]])
    measurement = mean_average_precision(truth, scores)
    assert measurement.value == pytest.approx((1 + 0.5) / 2)
    found = measurement.counted(np.array([[2.0, 0, 1], [0, 2, 1], [0, 0, 3]]))
    assert found[:2].tolist() == [1, 0.5] and np.isnan(found[2])


def test_the_interval_of_rare_labels_is_around_the_value() -> None:
    random = np.random.default_rng(0)
    truth = np.zeros((60, 40), dtype=bool)
    truth[random.integers(0, 60, 40), np.arange(40)] = True  # one sample each
    measurement = mean_average_precision(truth, random.random((60, 40)) + 0.4 * truth)
    low, high = interval(measurement)  # type: ignore[misc]
    assert low < measurement.value - 0.03 and measurement.value + 0.03 < high
    assert measurement.drawn.mean() == pytest.approx(measurement.value, abs=0.02)


@pytest.mark.parametrize("positives", [1, 2, 7, 30])
def test_a_random_order_has_the_expected_average_precision(positives: int) -> None:
    samples, orders = 30, 400
    truth = np.repeat((np.arange(samples) < positives)[:, None], orders, axis=1)
    found = mean_average_precision(truth, np.random.default_rng(positives).random(truth.shape))
    expected = random_average_precision(np.array([positives]), samples)[0]
    assert found.value == pytest.approx(expected, abs=0.05 if positives < samples else 1e-12)
    assert expected == 1 if positives == samples else expected > positives / samples, "more than their share"
    assert random_average_precision(np.array([1]), 1)[0] == 1
