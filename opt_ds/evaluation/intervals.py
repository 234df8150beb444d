"""Bootstrap intervals (Efron & Tibshirani 1993): how much a figure depends on which samples were measured.

A measurement is a function of how often each sample is counted. The figure is its value if every sample is counted once.
The interval contains 95 % of its values over seeded resamples (samples drawn with replacement). Two measurements of the same
samples are compared by the interval of their difference over the same resamples, which is much narrower than the two
intervals suggest.

Legend: b resamples, n samples, k numbers per sample.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_SEED = 20_210_724
_COUNTED_AT_ONCE = 1 << 22  # samples times resamples, 32 MiB

Interval = tuple[float, float]


def ratio(times_bn: np.ndarray, parts_n2: np.ndarray) -> np.ndarray:
    """Return the ratio of two sums over the samples [b], for means and rates; NaN for 0 / 0."""
    sums_b2 = times_bn @ parts_n2
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums_b2[:, 0] / sums_b2[:, 1]


@dataclass(frozen=True)
class Measurement:
    """A measurement of samples.

    Attributes:
        parts: What is known of each sample, float64 [n, k].
        statistic: Returns the values [b] for `times` [b, n], how often each sample is counted, and `parts` [n, k].
    """

    parts: np.ndarray
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray] = ratio

    @classmethod
    def mean(cls, values: np.ndarray) -> "Measurement":
        """Return the mean of one value per sample [n]."""
        return cls(np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1))

    def __len__(self) -> int:
        return len(self.parts)

    def counted(self, times_bn: np.ndarray) -> np.ndarray:
        """Return the value for each row of `times_bn`, how often each sample is counted, float64 [b]."""
        return self.statistic(times_bn, self.parts)

    def at(self, places: np.ndarray) -> "Measurement":
        """Return the measurement of some of the samples."""
        return Measurement(self.parts[places], self.statistic)

    @property
    def value(self) -> float:
        """The value if every sample is counted once."""
        return float(self.counted(np.ones((1, len(self))))[0])

    @cached_property
    def drawn(self) -> np.ndarray:
        """The values of the resamples, float64 [RESAMPLES]; empty for one sample. Its interval and every difference use them."""
        values = [self.counted(times) for times in _resamples(len(self))]
        return np.concatenate(values) if values else np.empty(0)


def interval(measurement: Measurement) -> Interval | None:
    """Return the 95 % interval of a measurement. One sample alone has none."""
    return _central(measurement.drawn)


def difference_interval(one: Measurement, other: Measurement) -> Interval | None:
    """Return the 95 % interval of `one` − `other`, two measurements of the same samples in the same order."""
    assert len(one) == len(other), "a paired difference is one of the same samples"
    return _central(one.drawn - other.drawn)


# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the last one, that of the last one.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval_of_few(values: np.ndarray) -> Interval | None:
    """Return the 95 % interval of the mean of few values, such as one per training, by Student's t. One has none."""
    if len(values) < 2:
        return None
    half = _T[min(len(values) - 1, len(_T)) - 1] * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _resamples(count: int) -> Iterator[np.ndarray]:
    """Yield how often each of `count` samples is counted, float64 [b, n], RESAMPLES rows in total. One sample yields none."""
    at_once = max(1, _COUNTED_AT_ONCE // max(count, 1))
    if count > 1 and at_once >= RESAMPLES:
        yield _all_resamples(count)
        return
    random = np.random.default_rng(_SEED)
    for start in range(0, RESAMPLES if count > 1 else 0, at_once):
        yield _some_resamples(random, min(at_once, RESAMPLES - start), count)


@lru_cache(maxsize=2)
def _all_resamples(count: int) -> np.ndarray:
    return _some_resamples(np.random.default_rng(_SEED), RESAMPLES, count)


def _some_resamples(random: np.random.Generator, rows: int, count: int) -> np.ndarray:
    chosen = random.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
    return np.bincount(chosen.reshape(-1), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _central(values: np.ndarray) -> Interval | None:
    found = values[~np.isnan(values)]
    if not len(found):
        return None
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
