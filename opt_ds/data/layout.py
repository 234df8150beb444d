"""Layout of a packed batch: the samples are concatenated, each as the rows of its modalities in their order.

With the built-in modalities a sample is `[CLS] text [SEP] regions frames`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class Layout:
    """Positions of each sample's rows in the packed order, and the special tokens."""

    def __init__(self, lengths: np.ndarray, cls_id: int, sep_id: int) -> None:
        """Lay out S samples with these numbers of rows, int64 [S, modalities]."""
        self.cls_id, self.sep_id = cls_id, sep_id
        self.lengths = lengths
        num_samples, count = lengths.shape
        self.starts = np.concatenate([[0], np.cumsum(self.lengths.sum(1))])
        self.total = int(self.starts[-1])
        self.first = self.starts[:-1, None] + np.concatenate(
            [np.zeros((num_samples, 1), np.int64), np.cumsum(self.lengths[:, :-1], axis=1)], axis=1
        )  # [S, modalities], first packed position of each modality
        self.row_start = np.concatenate(
            [np.zeros((1, count), np.int64), np.cumsum(self.lengths, axis=0)]
        )  # [S + 1, modalities]

    def index_of(self, modality: int) -> np.ndarray:
        """Return the packed position of each of the modality's rows, int64."""
        shift = np.repeat(self.first[:, modality] - self.row_start[:-1, modality], self.lengths[:, modality])
        return shift + np.arange(len(shift))


def join(parts: Sequence[np.ndarray], dtype: Any, width: tuple[int, ...] = ()) -> torch.Tensor:
    """Return all rows concatenated.

    The tensor is allocated by PyTorch, which aligns memory as the store does. NumPy's arrays are 16 bytes off, which
    halves the rate of a copy.
    """
    shape = (sum(map(len, parts)), *(parts[0].shape[1:] if parts else width))
    joined = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype)
    if parts:
        np.concatenate(parts, out=joined.numpy(), casting="same_kind")
    return joined


def as_long(values: Any) -> torch.Tensor:
    """Return the values as an int64 [n] tensor."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64).reshape(-1))
