"""Test bootstrap intervals: they cover the truth about as often as they say, and a paired difference is narrower."""

import numpy as np
import pytest

from opt_ds.evaluation import intervals
from opt_ds.evaluation.intervals import Measurement, difference_interval, interval, interval_of_few


def test_an_interval_covers_the_true_mean_in_about_95_of_100_draws() -> None:
    random, covered = np.random.default_rng(1), 0
    for _ in range(200):
        low, high = interval(Measurement.mean(random.exponential(1.0, 60)))  # type: ignore[misc]
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_it_is_about_two_standard_errors_wide_and_the_same_every_time() -> None:
    values = np.random.default_rng(0).normal(size=400)
    bounds = interval(Measurement.mean(values))
    assert bounds is not None and bounds == interval(Measurement.mean(values))
    assert bounds[1] - bounds[0] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_a_paired_difference_is_narrower_than_its_parts() -> None:
    random = np.random.default_rng(0)
    hard = 5 * random.normal(size=100)  # what makes a sample hard is the same for both
    one, other = Measurement.mean(hard + random.normal(size=100) + 1), Measurement.mean(hard + random.normal(size=100))
    bounds, own = difference_interval(one, other), interval(one)
    assert bounds is not None and own is not None
    assert bounds[0] > 0 and bounds[1] - bounds[0] < 0.5 * (own[1] - own[0])
    assert difference_interval(one, one) == (0, 0)


def test_a_rate_counts_sums_and_one_sample_has_no_interval() -> None:
    edits = Measurement(np.array([[1.0, 10.0], [3.0, 2.0]]))
    assert edits.value == pytest.approx(4 / 12)
    bounds = interval(edits)
    assert bounds is not None and bounds[0] == pytest.approx(0.1) and bounds[1] == pytest.approx(1.5)
    assert interval(Measurement.mean(np.ones(1))) is None and interval(Measurement.mean(np.ones(0))) is None
    assert edits.at(np.array([1])).value == pytest.approx(1.5)


def test_many_samples_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=100)
    whole = interval(Measurement.mean(values))
    monkeypatch.setattr(intervals, "_COUNTED_AT_ONCE", 3000)
    assert interval(Measurement.mean(values)) == pytest.approx(whole, abs=0.01)


def test_few_trainings_have_students_interval() -> None:
    low, high = interval_of_few(np.array([1.0, 2.0, 3.0]))  # type: ignore[misc]
    assert (low + high) / 2 == pytest.approx(2) and high - 2 == pytest.approx(4.303 / np.sqrt(3))
    assert interval_of_few(np.array([1.0])) is None
