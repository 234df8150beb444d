"""Mean average precision of many rare labels, and what a random order reaches.

Legend: n samples, p positive samples of a label, c labels, b resamples.
"""

import warnings

import numpy as np

from opt_ds.evaluation.intervals import Measurement


def mean_average_precision(y_nc: np.ndarray, scores_nc: np.ndarray) -> Measurement:
    """Return the mean of the labels' average precisions (scikit-learn's) as a measurement of the samples.

    For its interval the positive samples are drawn, and not those that they are ranked among, as for recall. If all were
    drawn, a positive sample that is drawn twice would be ranked next to itself, which overrates labels of few samples.
    (`classification` draws all: its labels are frequent.)

    Args:
        y_nc: Which samples have each label, bool. Every label has a sample.
        scores_nc: A score per sample and label. The order of the samples by it is what counts.
    """
    precisions_nc = np.zeros(y_nc.shape)
    for c in range(y_nc.shape[1]):
        positives = np.flatnonzero(y_nc[:, c])
        precisions_nc[positives, c] = _precisions(scores_nc[:, c], positives)
    return Measurement(np.concatenate([precisions_nc, y_nc], axis=1), _mean_over_labels)


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


def _precisions(scores_n: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return which fraction of the samples with at least the score of each positive one are positive, float64 [p]."""
    reached_np = scores_n[:, None] >= scores_n[positives]
    return reached_np[positives].sum(0) / reached_np.sum(0)


def _mean_over_labels(times_bn: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return the mean over the labels of which a positive sample is drawn, float64 [b]; NaN if none is."""
    sums_bc, counts_bc = np.split(times_bn @ parts, 2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample without any label
        return np.nanmean(sums_bc / counts_bc, axis=1)
