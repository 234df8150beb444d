"""Number of items that the model reads of a store's rows, after truncation and stacking of frames."""

import numpy as np

from opt_ds.config import ModelConfig
from opt_ds.store.reader import FeatureStore


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


def model_lengths(model: ModelConfig, store: FeatureStore) -> list[ModelLengths]:
    """Return the lengths of the text, image and audio rows."""
    return [
        ModelLengths(store.text_lengths, model.max_text_tokens),
        ModelLengths(store.region_counts, model.max_regions),
        ModelLengths(store.frame_counts, model.max_frames, model.audio_stack),
    ]


def stacked_length(num_frames: np.ndarray | int, stack: int) -> np.ndarray:
    """Return the number of model frames for `num_frames` stored frames.

    It is sufficient for every offset 0 … stack − 1; 0 stays 0.
    """
    num_frames = np.asarray(num_frames, dtype=np.int64)
    if stack == 1:
        return num_frames
    return np.where(num_frames > 0, (num_frames + 2 * stack - 2) // stack, 0)
