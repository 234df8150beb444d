"""Masking of a modality's items: how many, and which ones."""

import numpy as np

from opt_ds.ops.keyed import keyed_hash


def num_masked(lengths: np.ndarray | int, probability: float) -> np.ndarray:
    """Return max(1, round(probability · n)) for n items and 0 for 0 items, int64, elementwise.

    Halves are rounded to even.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.where(lengths > 0, np.maximum(1, np.rint(probability * lengths)), 0).astype(np.int64)


def masked_items(length: int, count: int, *keys: int | str) -> np.ndarray:
    """Return bool [length] with exactly `count` ones. All subsets are equally likely."""
    masked = np.zeros(length, dtype=bool)
    masked[np.argsort(keyed_hash(*keys, np.arange(length)), kind="stable")[:count]] = True
    return masked


def masked_spans(length: int, count: int, span: int, *keys: int | str) -> np.ndarray:
    """Return bool [length] with exactly `count` ones in runs of `span`. Runs may touch, and one run may be shorter."""
    masked = np.zeros(length, dtype=bool)
    # No run is truncated by the end: a single masked item could be copied from its neighbour.
    num_starts = max(1, length - span + 1)
    for start in np.argsort(keyed_hash(*keys, np.arange(num_starts)), kind="stable"):
        free = np.flatnonzero(~masked[start : start + span])[: count - int(masked.sum())]
        masked[start + free] = True
        if masked.sum() == count:
            break
    return masked
