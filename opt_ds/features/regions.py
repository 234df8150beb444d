"""The base class and the result type of all region feature extractors, and the computation of boxes.

Shape letters: R regions, C channels.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from opt_ds.features.extractors import Extractor
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


class RegionExtractor(Extractor):
    """An extractor of RegionFeatures from RGB images, or from files that have them (`reads_files`)."""

    kind = "image"
    #: Size of a feature.
    dim: int
    #: Number of region classes. 0: there are none. All labels are 0 then, and MRC is disabled.
    num_classes: int

    @abstractmethod
    def extract(self, inputs: Sequence[Any]) -> list[RegionFeatures | None]:
        """Return the regions of each image, or of each file's path; None for None."""


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
