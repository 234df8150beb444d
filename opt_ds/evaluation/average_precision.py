"""Mean average precision of scores, counted by resamples of the samples, and what a random order reaches.

Legend: b resamples, n samples, p positive samples of a label, c labels.
"""

import warnings

import numpy as np

from opt_ds.evaluation.intervals import Measurement

_FEW = 64  # positive samples, up to which a product of matrices is quicker than sorting


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
            warnings.simplefilter("ignore", RuntimeWarning)  # a resample without any label
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
    """Return the average precision [b] of one label; NaN for resamples without a positive sample."""
    positives = np.flatnonzero(y_n)
    count = _counts_of_few if len(positives) <= _FEW else _counts_of_many
    hits_bp, ranked_bp = count(times_bn, positives, scores_n)
    right_bp = times_bn[:, positives]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (right_bp * np.nan_to_num(hits_bp / ranked_bp)).sum(1) / right_bp.sum(1)


def _counts_of_few(times_bn: np.ndarray, positives: np.ndarray, scores_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how often a positive sample, and any sample, is drawn with at least the score of each positive one [b, p].

    Samples of equal score are counted with it, as in scikit-learn.
    """
    reached_np = (scores_n[:, None] >= scores_n[positives]).astype(np.float64)
    return times_bn[:, positives] @ reached_np[positives], times_bn @ reached_np


def _counts_of_many(
    times_bn: np.ndarray, positives: np.ndarray, scores_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the same as `_counts_of_few`, in a time that does not grow with the number of positive samples."""
    order = np.argsort(-scores_n, kind="stable")
    ranked = -scores_n[order]
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.searchsorted(ranked, ranked, side="right") - 1  # of the last sample of equal score
    is_positive = np.isin(order, positives)
    counted_bn = times_bn[:, order]
    hits_bn, ranked_bn = (counted_bn * is_positive).cumsum(1), counted_bn.cumsum(1)
    return hits_bn[:, place[positives]], ranked_bn[:, place[positives]]
