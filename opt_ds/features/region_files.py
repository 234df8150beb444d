"""Own region features: one `.npz`, `.npy`, safetensors or HDF5 file per image, of any encoder and any size.

The arrays are features [R, Dv], also named x, or the only array of the file. Further arrays are optional:

    boxes [R, 4, 6 or 7]       x1, y1, x2, y2[, w, h[, w*h]] in 0..1; also named norm_bb
    bbox [R, 4]                the same corners in pixels, with image_w and image_h
    scores [R]                 confidence in 0..1; also named conf
    labels [R]                 class of each region, from 0; or soft_labels [R, K] in 0..1

Files of UNITER and of bottom-up-attention.pytorch have these names. Nothing is repaired: an array that does not match its name
is a ValueError, which `opt-ds prepare` reports with the sample.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from opt_ds.config.section import Section
from opt_ds.decoding.array_files import FEATURES
from opt_ds.decoding.decoder import load_arrays
from opt_ds.features.feature_arrays import (
    as_float16,
    best_classes,
    by_name,
    check_range,
    corners,
    features_of,
    first_size,
    numbers,
)
from opt_ds.features.regions import RegionExtractor, RegionFeatures, boxes_with_size
from opt_ds.store.clusters import MAX_CLUSTERS

#: Other names of arrays -> their first names.
OTHER_NAMES = {"x": FEATURES, "boxes": "norm_bb", "scores": "conf"}
_WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)


class RegionFileOptions(Section):
    """The options of region_files."""

    dim: int | None = Field(None, ge=1, description="Size of a feature. None: that of the first file.")
    num_classes: int | None = Field(
        None, ge=0, le=MAX_CLUSTERS,
        description="Number of region classes. 0: none; labels of the files are left out. None: none; files with labels are "
        "refused.",
    )  # fmt: skip
    confidence: float | None = Field(
        None, description="Regions at or below this score are dropped, except to reach `min_regions`. None: all are kept."
    )
    min_regions: int = Field(10, ge=1, description="With `confidence`: smallest number of regions, as far as the file has them.")
    max_regions: int | None = Field(None, ge=1, description="Largest number of regions per image. None: all are kept.")


class RegionFileExtractor(RegionExtractor):
    """Reads files of features instead of images. The manifest's `image` field names the files.

    Regions with scores are sorted, best first. Others keep their order and get the score 1. A region without a box has that of
    the whole image.
    """

    name = "region_files"
    options = RegionFileOptions
    reads_files = True

    def __init__(self, options: RegionFileOptions, device: str = "cpu") -> None:
        assert options.dim is not None, "settle has set it"
        self.dim, self.num_classes = options.dim, options.num_classes or 0
        self._takes_labels = options.num_classes is not None
        self._confidence, self._min, self._max = options.confidence, options.min_regions, options.max_regions

    @classmethod
    def settle(cls, options: Section, files: Iterable[Path]) -> Section:
        """Return the options with the size of the first file's features, unless they set one."""
        assert isinstance(options, RegionFileOptions)
        dim = options.dim or first_size(files, f"--images {cls.name}", OTHER_NAMES)
        return options.model_copy(update={"dim": dim})

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint. The options are added to it, the files are not part of it."""
        return {"name": self.name, "weights_sha256": None}

    def extract(self, inputs: Sequence[Path | None]) -> list[RegionFeatures | None]:
        """Return the regions of each file. Raise ValueError for a file with other arrays, sizes or units."""
        return [None if path is None else self._read(path) for path in inputs]

    def _read(self, path: Path) -> RegionFeatures:
        try:
            return self.regions(by_name(load_arrays(path), OTHER_NAMES))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None

    def regions(self, arrays: Mapping[str, np.ndarray]) -> RegionFeatures:
        """Return the regions of a file's arrays. The ValueError names the array that is wrong."""
        features = features_of(arrays)
        count = len(features)
        if features.shape[1] != self.dim:
            raise ValueError(f"features of {features.shape[1]} values, not {self.dim} as the first file")
        has_boxes = "norm_bb" in arrays or "bbox" in arrays
        boxes = corners(arrays) if has_boxes else np.tile(np.array(_WHOLE_IMAGE, np.float32), (count, 1))
        scores = numbers(arrays, "conf", 1) if "conf" in arrays else np.ones(count)
        labels = self._labels(arrays, count)
        if not count == len(boxes) == len(scores) == len(labels):
            raise ValueError(f"{count} features, {len(boxes)} boxes, {len(scores)} scores, {len(labels)} labels")
        check_range("conf", scores)
        kept = np.argsort(-scores.astype("float64"), kind="stable")[: self._number(scores)]
        return RegionFeatures(
            as_float16(features[kept]),
            boxes_with_size(boxes[kept]),
            labels[kept],
            np.clip(scores[kept], 0, 1).astype("float16"),
        )

    def _number(self, scores: np.ndarray) -> int:
        """Return how many regions are kept."""
        count = len(scores)
        if self._confidence is not None:
            count = min(count, max(int((scores > self._confidence).sum()), self._min))
        return count if self._max is None else min(count, self._max)

    def _labels(self, arrays: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """Return the class of each region, int16 [R]; 0 without classes."""
        given = [name for name in ("labels", "soft_labels") if name in arrays]
        if given and not self._takes_labels:
            raise ValueError(
                f"it has {given[0]}: set their number with --extractor-option image.num_classes=K, or image.num_classes=0 to "
                "leave them out"
            )
        if not given or not self.num_classes:
            return np.zeros(count, "int16")
        if given[0] == "soft_labels":
            return best_classes(arrays, count, self.num_classes)
        labels = numbers(arrays, "labels", 1)
        if labels.dtype.kind not in "iu":
            raise ValueError(f"labels of dtype {labels.dtype}, not integers")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}, outside 0..{self.num_classes - 1}")
        return labels.astype("int16")
