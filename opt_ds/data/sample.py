"""One sample, as it is packed into a batch.

Legend: n WordPieces, r regions, a model frames (`audio_stack` stored frames each), v feature width.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Sample:
    """Content of one sequence of a batch. Absent modalities are None."""

    name: str = ""
    slot: int = 0  # global sample index: the key of dropout, which therefore does not depend on the ranks
    token_ids: np.ndarray | None = None  # int64 [n], with masked tokens replaced, without [CLS] and [SEP]
    tokens_masked: np.ndarray | None = None  # bool [n]; None: nothing is masked
    original_ids: np.ndarray | None = None  # int64 [n], before masking
    region_features: np.ndarray | None = None  # float16 [r, v], original
    region_boxes: np.ndarray | None = None  # float32 [r, 7]
    region_labels: np.ndarray | None = None  # int64 [r]
    region_masked: np.ndarray | None = None  # bool [r]; None: nothing is masked
    frames: np.ndarray | None = None  # float16 [a, stack · v], original
    frame_masked: np.ndarray | None = None  # bool [a]; None: nothing is masked
    targets: dict[str, Any] = field(default_factory=dict)  # task -> its targets (see the task's file)


def given(part: np.ndarray | None) -> np.ndarray:
    """Return an optional part of a sample that must be present."""
    assert part is not None, "the sample lacks a part that its modality or task needs"
    return part
