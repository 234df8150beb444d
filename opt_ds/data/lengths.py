"""How many items the model sees of a store's rows: truncated, and frames stacked."""

import numpy as np

from opt_ds.config import ModelConfig
from opt_ds.store.reader import FeatureStore


class ModelLengths:
    """Lengths by row, worked out when asked for: a plan must not hold an array of every row of a large store."""

    def __init__(self, stored: np.ndarray, limit: int, stack: int = 1) -> None:
        self._stored, self._limit, self._stack = stored, limit, stack

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """int64, of each of these rows."""
        return np.minimum(stacked_length(self._stored[rows], self._stack), self._limit)

    def truncated(self, rows: np.ndarray) -> np.ndarray:
        """bool, whether the model's limit drops items of these rows."""
        return stacked_length(self._stored[rows], self._stack) > self._limit


def model_lengths(model: ModelConfig, store: FeatureStore) -> list[ModelLengths]:
    """Of the text, image and audio rows."""
    return [
        ModelLengths(store.text_lengths, model.max_text_tokens),
        ModelLengths(store.region_counts, model.max_regions),
        ModelLengths(store.frame_counts, model.max_frames, model.audio_stack),
    ]


def stacked_length(num_frames: np.ndarray | int, stack: int) -> np.ndarray:
    """Model frames of so many stored frames: enough for every offset 0 … stack − 1 (0 frames give 0)."""
    num_frames = np.asarray(num_frames, dtype=np.int64)
    if stack == 1:
        return num_frames
    return np.where(num_frames > 0, (num_frames + 2 * stack - 2) // stack, 0)
