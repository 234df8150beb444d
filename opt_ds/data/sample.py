"""One sample as it goes into a packed batch.

n: WordPieces, r: regions, a: model frames (stored frames joined by `audio_stack`), v: feature width.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Sample:
    """What one sequence of a batch holds. Absent modalities are None."""

    name: str = ""
    slot: int = 0  # place in the global batch: the key of dropout that does not depend on the ranks
    token_ids: np.ndarray | None = None  # int64 [n], corrupted where masked, without [CLS] and [SEP]
    tokens_masked: np.ndarray | None = None  # bool [n]; None: none
    original_ids: np.ndarray | None = None  # int64 [n], before masking
    region_features: np.ndarray | None = None  # float16 [r, v], original
    region_boxes: np.ndarray | None = None  # float32 [r, 7]
    region_labels: np.ndarray | None = None  # int64 [r]
    region_masked: np.ndarray | None = None  # bool [r]; None: none
    frames: np.ndarray | None = None  # float16 [a, stack · v], original
    frame_masked: np.ndarray | None = None  # bool [a]; None: none
    targets: dict[str, Any] = field(default_factory=dict)  # task -> what it is to predict (see the task's file)


def given(part: np.ndarray | None) -> np.ndarray:
    """An optional part of a sample where its modality or task says that it is there."""
    assert part is not None, "the sample lacks a part that its modality or task needs"
    return part
