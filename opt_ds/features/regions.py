"""The result type of all region feature extractors, and the computation of boxes.

Shape letters: R regions, C channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from opt_ds.store.checks import corner_problems


class RegionFeatures(NamedTuple):
    """The regions of one image.

    `features` is float16 [R, C], `boxes` float32 [R, 7] (x1, y1, x2, y2, w, h, w*h in 0..1), `labels` [R], `scores`
    [R].
    """

    features: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


class RegionExtractor(Protocol):
    """An extractor (see extractors.py) of RegionFeatures, with `num_classes` region classes.

    The inputs are RGB images. For extractors with an attribute `reads_files` they are paths.
    """

    name: str
    dim: int
    num_classes: int

    def identity(self) -> dict[str, Any]:
        """Return the fingerprint: everything that the features depend on."""
        ...

    def extract(self, inputs: Sequence[Any]) -> list[RegionFeatures | None]:
        """Return the regions of each input; None for None."""
        ...


def boxes_with_size(corners_r4: np.ndarray) -> np.ndarray:
    """Return boxes float32 [R, 7] from corners (x1, y1, x2, y2) in 0..1: with width, height and area, as in UNITER.

    Rounding errors of half precision are clipped. Raise ValueError for a corner further outside, or for x2 < x1 or y2 <
    y1.
    """
    corners_r4 = corners_r4.astype("float32")
    if (problem := next(corner_problems(corners_r4), None)) is not None:
        raise ValueError(problem)
    corners_r4 = np.clip(corners_r4, 0, 1)
    width = corners_r4[:, 2] - corners_r4[:, 0]
    height = corners_r4[:, 3] - corners_r4[:, 1]
    return np.concatenate([corners_r4, np.stack([width, height, width * height], 1)], axis=1)
