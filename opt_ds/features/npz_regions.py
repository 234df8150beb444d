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
from opt_ds.features.regions import RegionExtractor, RegionFeatures, boxes_with_size
from opt_ds.store.checks import BOX_TOLERANCE


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
        features = _numbers(arrays, "features", 2)
        if features.shape[1] != self.dim:
            raise ValueError(f"features of shape {list(features.shape)}, not [R, {self.dim}]")
        if not len(features):
            raise ValueError("no region is in it")
        corners = _corners(arrays)
        scores = _numbers(arrays, "conf", 1)
        if not len(features) == len(corners) == len(scores):
            raise ValueError(f"{len(features)} features, {len(corners)} boxes, {len(scores)} scores")
        _check_range("conf", scores)
        labels = self._labels(arrays, len(features))
        order = np.argsort(-scores.astype("float64"), kind="stable")
        confident = int((scores > self._settings["confidence"]).sum())
        kept = order[: min(max(confident, self._settings["min_regions"]), self._settings["max_regions"])]
        return RegionFeatures(
            _as_float16(features[kept]),
            boxes_with_size(corners[kept]),
            labels[kept],
            np.clip(scores[kept], 0, 1).astype("float16"),
        )

    def _labels(self, arrays: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """Return the most likely class of each region, int16 [R]."""
        if "soft_labels" not in arrays:
            return np.zeros(count, "int16")
        soft = _numbers(arrays, "soft_labels", 2)
        if len(soft) != count or not soft.shape[1]:
            raise ValueError(f"soft_labels of shape {list(soft.shape)}, not [{count}, K]")
        if soft.shape[1] > self.num_classes:
            raise ValueError(f"soft_labels of {soft.shape[1]} classes, not {self.num_classes}")
        _check_range("soft_labels", soft)
        blank = np.flatnonzero(soft.max(1) <= 0)
        if len(blank):
            raise ValueError(f"soft_labels: row {blank[0]} gives no class any probability")
        return soft.argmax(1).astype("int16")


def _numbers(arrays: Mapping[str, np.ndarray], name: str, ndim: int) -> np.ndarray:
    """Return an array of real, finite numbers with `ndim` dimensions."""
    if name not in arrays:
        raise ValueError(f"it has no array {name}")
    array = arrays[name]
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} of dtype {array.dtype}, not numbers")
    if ndim == 1 and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != ndim:
        raise ValueError(f"{name} of shape {list(array.shape)}, not {'[R, N]' if ndim == 2 else '[R]'}")
    if not np.isfinite(array).all():
        bad = ~np.isfinite(array.reshape(len(array), -1)).all(1)
        raise ValueError(f"{name}: NaN or infinite, first in row {int(np.flatnonzero(bad)[0])}")
    return array


def _corners(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the corners in 0..1, float32 [R, 4], from norm_bb or from bbox and the size of the image."""
    if "norm_bb" not in arrays and "bbox" in arrays:
        return _corners_of_pixels(arrays)
    boxes = _numbers(arrays, "norm_bb", 2).astype("float32")
    if boxes.shape[1] not in (4, 6, 7):
        raise ValueError(f"norm_bb of shape {list(boxes.shape)}, not [R, 6] or [R, 7]")
    largest = float(boxes.max(initial=0))
    if largest > 1 + BOX_TOLERANCE:
        raise ValueError(
            f"norm_bb reaches {largest:g}, not 1: divide pixels by the image's width and height, or name the array bbox "
            "and add image_w and image_h"
        )
    lowest = float(boxes.min(initial=0))
    if lowest < -BOX_TOLERANCE:
        raise ValueError(f"norm_bb falls to {lowest:g}, below 0")
    if boxes.shape[1] > 4:
        _check_sizes(boxes)
    _check_order("norm_bb", boxes)
    return boxes[:, :4]


def _corners_of_pixels(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    boxes = _numbers(arrays, "bbox", 2).astype("float64")
    if boxes.shape[1] != 4:
        raise ValueError(f"bbox of shape {list(boxes.shape)}, not [R, 4]")
    sides = []
    for name in ("image_w", "image_h"):
        if name not in arrays:
            raise ValueError(f"it has bbox and no {name}: give both sides of the image, or norm_bb in 0..1")
        side = arrays[name]
        if side.dtype.kind not in "fiu" or side.size != 1 or not np.isfinite(side).all() or side.reshape(-1)[0] <= 0:
            raise ValueError(f"{name} is not a length in pixels")
        sides.append(float(side.reshape(-1)[0]))
    width, height = sides
    _check_order("bbox", boxes)
    beyond = boxes - [width, height, width, height]
    # Some detectors treat the last pixel as inclusive, so that a box ends one pixel outside the image.
    if boxes.min(initial=0) < -1 or beyond.max(initial=0) > 1:
        raise ValueError(f"bbox leaves the image of {width:g} x {height:g} pixels")
    if boxes.max(initial=0) <= 1 < min(width, height):
        raise ValueError("bbox holds fractions, not pixels: name the array norm_bb")
    return np.clip(boxes / [width, height, width, height], 0, 1).astype("float32")


def _check_order(name: str, boxes: np.ndarray) -> None:
    crossed = np.flatnonzero((boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1]))
    if len(crossed):
        x1, y1, x2, y2 = boxes[crossed[0], :4]
        raise ValueError(
            f"{name}: row {crossed[0]} ends before it begins (x {x1:g} to {x2:g}, y {y1:g} to {y2:g}): give x1, y1, x2, y2"
        )


def _check_sizes(boxes: np.ndarray) -> None:
    """Raise ValueError if widths and heights disagree with the corners.

    Then a column has another meaning (such as x, y, w, h).
    """
    x1, y1, x2, y2, width, height = boxes[:, :6].T
    wrong = (np.abs(x2 - x1 - width) > _SIZE_TOLERANCE) | (np.abs(y2 - y1 - height) > _SIZE_TOLERANCE)
    if boxes.shape[1] == 7:
        wrong |= np.abs(width * height - boxes[:, 6]) > _SIZE_TOLERANCE
    if wrong.any():
        raise ValueError(f"norm_bb: row {int(np.flatnonzero(wrong)[0])}: width, height or area do not follow from the corners")


# Half precision rounds each of the three numbers near 1 by up to 2**-12.
_SIZE_TOLERANCE = 2e-3


def _check_range(name: str, array: np.ndarray) -> None:
    low, high = float(array.min(initial=0)), float(array.max(initial=0))
    if low < -BOX_TOLERANCE or high > 1 + BOX_TOLERANCE:
        raise ValueError(f"{name} runs from {low:g} to {high:g}, outside 0..1")


def _as_float16(features: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = features.astype("float16")
    if not np.isfinite(stored).all():
        raise ValueError(f"features reach {np.abs(features).max():g}, beyond float16, whose largest value is 65504")
    return stored
