"""Guesses of a region's or frame's features from the others of the same sample: what copying neighbours reaches.

Legend: n items of a sample, v features, m masked items.
"""

from collections.abc import Callable

import numpy as np

#: Largest distance to a visible frame that is told apart.
FARTHEST = 8


def mean_of_others(vectors_nv: np.ndarray) -> np.ndarray:
    """Return the mean of all other vectors for each vector, float64 [n, v]; 0 for a single one."""
    return (vectors_nv.sum(0) - vectors_nv) / max(len(vectors_nv) - 1, 1)


def mean_of_visible(vectors_nv: np.ndarray, masked_n: np.ndarray) -> np.ndarray:
    """Return the mean of the visible vectors, float64 [v]; 0 if there are none."""
    visible = vectors_nv[~masked_n]
    return visible.mean(0) if len(visible) else np.zeros(vectors_nv.shape[1])


def mean_at_distance(distance: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that guesses each frame [n, v] as the mean of those `distance` before and after it."""
    return _AT_DISTANCE[distance]


def interpolated(vectors_nv: np.ndarray, masked_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate the masked frames linearly between the nearest visible ones. At an end, the nearest one is copied.

    Args:
        vectors_nv: Frames, float64 [n, v].
        masked_n: Which are masked, bool [n].

    Returns:
        The guesses, float64 [m, v], 0 if no frame is visible; and the distance of each to the nearest visible frame,
        int64 [m], at most FARTHEST.
    """
    visible, places = np.flatnonzero(~masked_n), np.flatnonzero(masked_n)
    if not len(visible):
        return np.zeros((len(places), vectors_nv.shape[1])), np.full(len(places), FARTHEST)
    after = np.searchsorted(visible, places)
    left, right = visible[np.maximum(after - 1, 0)], visible[np.minimum(after, len(visible) - 1)]
    to_left, to_right = np.abs(places - left), np.abs(right - places)
    share = np.where(left == right, 1.0, to_right / np.maximum(to_left + to_right, 1))[:, None]
    guesses = share * vectors_nv[left] + (1 - share) * vectors_nv[right]
    return guesses, np.minimum(np.minimum(to_left, to_right), FARTHEST)


def _at_distance(distance: int) -> Callable[[np.ndarray], np.ndarray]:
    def guess(vectors_nv: np.ndarray) -> np.ndarray:
        places = np.arange(len(vectors_nv))
        before, after = places - distance, places + distance
        known = np.stack([before >= 0, after < len(places)]).astype(np.float64)
        values = np.stack([vectors_nv[np.maximum(before, 0)], vectors_nv[np.minimum(after, len(places) - 1)]])
        return (known[:, :, None] * values).sum(0) / np.maximum(known.sum(0), 1)[:, None]

    return guess


_AT_DISTANCE = {distance: _at_distance(distance) for distance in range(1, FARTHEST + 1)}
