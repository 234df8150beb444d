"""What every extractor of region features yields, and their boxes.

Shapes: R regions, C channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from opt_ds.store.checks import corner_problems


class RegionFeatures(NamedTuple):
    """features float16 [R, C], boxes float32 [R, 7] (x1, y1, x2, y2, w, h, w*h in 0..1), labels [R], scores [R]."""

    features: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


class RegionExtractor(Protocol):
    """An extractor (see extractors.py) of RegionFeatures, with `num_classes` region classes.

    From RGB pictures, or, with an attribute `reads_files`, from paths.
    """

    name: str
    dim: int
    num_classes: int

    def identity(self) -> dict[str, Any]: ...

    def extract(self, inputs: Sequence[Any]) -> list[RegionFeatures | None]: ...


def boxes_with_size(corners_r4: np.ndarray) -> np.ndarray:
    """Return float32 [R, 7] from corners (x1, y1, x2, y2) in 0..1: with width, height, area, as in UNITER.

    Only what half precision overshoots is clipped: ValueError for a corner further outside, or for x2 < x1 or y2 < y1.
    """
    corners_r4 = corners_r4.astype("float32")
    if (problem := next(corner_problems(corners_r4), None)) is not None:
        raise ValueError(problem)
    corners_r4 = np.clip(corners_r4, 0, 1)
    width = corners_r4[:, 2] - corners_r4[:, 0]
    height = corners_r4[:, 3] - corners_r4[:, 1]
    return np.concatenate([corners_r4, np.stack([width, height, width * height], 1)], axis=1)
