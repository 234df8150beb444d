"""Number of items that the model reads of a store's rows, after truncation and stacking."""

import numpy as np


class ModelLengths:
    """Lengths per row, computed on access.

    A step plan must not hold an array with every row of a large store.
    """

    def __init__(self, stored: np.ndarray, limit: int, stack: int = 1) -> None:
        self._stored, self._limit, self._stack = stored, limit, stack

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return the lengths of these rows, int64."""
        return np.minimum(stacked_length(self._stored[rows], self._stack), self._limit)

    def truncated(self, rows: np.ndarray) -> np.ndarray:
        """Return whether the model's limit drops items of these rows, bool."""
        return stacked_length(self._stored[rows], self._stack) > self._limit


def stacked_length(num_stored: np.ndarray | int, stack: int) -> np.ndarray:
    """Return the number of the model's items for `num_stored` stored items.

    It is sufficient for every offset 0 … stack − 1; 0 stays 0.
    """
    num_stored = np.asarray(num_stored, dtype=np.int64)
    if stack == 1:
        return num_stored
    return np.where(num_stored > 0, (num_stored + 2 * stack - 2) // stack, 0)
