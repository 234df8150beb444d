"""Mean average precision of scores, counted by draws of the samples, and what a random order reaches.

Legend: b draws, n samples, p positive samples of a label, c labels.
"""

import warnings

import numpy as np

from opt_ds.evaluation.intervals import Measurement


def mean_average_precision(y_nc: np.ndarray, scores_nc: np.ndarray) -> Measurement:
    """Return the mean of the labels' average precisions (scikit-learn's) as a measurement of the samples.

    Args:
        y_nc: Which samples have each label, bool.
        scores_nc: A score per sample and label. The order of the samples by it is what counts.
    """
    labels = y_nc.shape[1]

    def statistic(times_bn: np.ndarray, parts: np.ndarray) -> np.ndarray:
        found = [_average_precision(times_bn, parts[:, c] > 0, parts[:, labels + c]) for c in range(labels)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a draw without any label
            return np.nanmean(np.stack(found), axis=0)

    return Measurement(np.concatenate([y_nc, scores_nc], axis=1).astype(np.float64), statistic)


def random_average_precision(positives: np.ndarray, samples: int) -> np.ndarray:
    """Return the expected average precision of a random order, exact, float64 [c].

    It is more than the share of the positives, because few positives are sometimes ranked first by luck: the precision at
    a positive of rank k is (1 + (k - 1)(p - 1)/(n - 1)) / k on average, and its rank is uniform.

    Args:
        positives: Number of positive samples of each label, at least 1.
        samples: Number of samples.
    """
    if samples < 2:
        return np.ones(len(positives))
    harmonic = (1 / np.arange(1, samples + 1)).sum()
    return (harmonic + (positives - 1) / (samples - 1) * (samples - harmonic)) / samples


def _average_precision(times_bn: np.ndarray, y_n: np.ndarray, scores_n: np.ndarray) -> np.ndarray:
    """Return the average precision [b] of one label; NaN for draws without a positive sample."""
    order = np.argsort(-scores_n, kind="stable")
    ranked, counted_bn = -scores_n[order], times_bn[:, order]
    places = np.flatnonzero(y_n[order])
    last = np.searchsorted(ranked, ranked[places], side="right") - 1  # equal scores have the precision of the last one
    right_bp = counted_bn[:, places]
    hits_bp = right_bp.cumsum(1)[:, np.searchsorted(places, last, side="right") - 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision_bp = np.nan_to_num(hits_bp / counted_bn.cumsum(1)[:, last])
        return (right_bp * precision_bp).sum(1) / right_bp.sum(1)
