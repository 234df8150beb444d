"""Precomputed region features: `.npz` files as UNITER (Chen et al. 2020) publishes them, one per image.

The arrays are features [R, Dv]; norm_bb [R, 4, 6 or 7] (x1, y1, x2, y2[, w, h[, w*h]] in 0..1), or bbox [R, 4] in
pixels with image_w and image_h; conf [R] in 0..1; and soft_labels [R, K] in 0..1 (class 0 if absent). Regions are
sorted by confidence and selected as in UNITER: confidence above 0.2, at least 10 and at most 100 regions.

Nothing is repaired. An array that does not match its name is a ValueError, which `opt-ds prepare` reports with the
sample.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from opt_ds.config.section import Section
from opt_ds.decoding.decoder import load_arrays
from opt_ds.features.feature_arrays import as_float16, best_classes, check_range, corners, numbers
from opt_ds.features.regions import RegionExtractor, RegionFeatures, boxes_with_size


class NpzOptions(Section):
    """The options of npz. Those of the selection are UNITER's."""

    dim: int = Field(2048, ge=1, description="Size of a feature.")
    num_classes: int = Field(1601, ge=0, description="Number of region classes. 0: none, and MRC is disabled.")
    confidence: float = Field(0.2, description="Regions at or below this score are dropped, except to reach `min_regions`.")
    min_regions: int = Field(10, ge=1, description="Smallest number of regions per image, as far as the file has them.")
    max_regions: int = Field(100, ge=1, description="Largest number of regions per image.")


class NpzExtractor(RegionExtractor):
    """Reads `.npz` files instead of images. The manifest's `image` field names the files."""

    name = "npz"
    options = NpzOptions
    reads_files = True

    def __init__(self, options: NpzOptions | None = None, device: str = "cpu") -> None:
        options = options or NpzOptions()
        self.dim, self.num_classes = options.dim, options.num_classes
        self._settings = options.model_dump(include={"confidence", "min_regions", "max_regions"})

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint: everything besides the files that the features depend on."""
        return {"name": self.name, "dim": self.dim, "num_classes": self.num_classes, "weights_sha256": None, **self._settings}

    def extract(self, inputs: Sequence[Path | None]) -> list[RegionFeatures | None]:
        """Return the regions of each file. Raise ValueError for a file with other arrays, sizes or units."""
        return [None if path is None else self._read(path) for path in inputs]

    def _read(self, path: Path) -> RegionFeatures:
        try:
            return self.regions(load_arrays(path))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None

    def regions(self, arrays: Mapping[str, np.ndarray]) -> RegionFeatures:
        """Return the best regions of a file's arrays, best first. The ValueError names the array that is wrong."""
        features = numbers(arrays, "features", 2)
        if features.shape[1] != self.dim:
            raise ValueError(f"features of shape {list(features.shape)}, not [R, {self.dim}]")
        if not len(features):
            raise ValueError("no region is in it")
        boxes = corners(arrays)
        scores = numbers(arrays, "conf", 1)
        if not len(features) == len(boxes) == len(scores):
            raise ValueError(f"{len(features)} features, {len(boxes)} boxes, {len(scores)} scores")
        check_range("conf", scores)
        labels = self._labels(arrays, len(features))
        order = np.argsort(-scores.astype("float64"), kind="stable")
        confident = int((scores > self._settings["confidence"]).sum())
        kept = order[: min(max(confident, self._settings["min_regions"]), self._settings["max_regions"])]
        return RegionFeatures(
            as_float16(features[kept]),
            boxes_with_size(boxes[kept]),
            labels[kept],
            np.clip(scores[kept], 0, 1).astype("float16"),
        )

    def _labels(self, arrays: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """Return the most likely class of each region, int16 [R]."""
        if "soft_labels" not in arrays:
            return np.zeros(count, "int16")
        return best_classes(arrays, count, self.num_classes)
