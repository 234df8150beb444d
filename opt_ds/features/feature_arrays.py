"""Arrays of files of features: checked by name, with the reason why one cannot be used.

Nothing is repaired. A ValueError names the array that is wrong.

Shape letters: R regions, N values of a row, K classes.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from opt_ds.decoding.array_files import FEATURES
from opt_ds.decoding.decoder import DecodingError, load_arrays
from opt_ds.errors import UserError
from opt_ds.store.checks import BOX_TOLERANCE

# Half precision rounds each of the three numbers near 1 by up to 2**-12.
_SIZE_TOLERANCE = 2e-3
_TRIED = 100  # files that the size of a feature is looked for in


def first_size(files: Iterable[Path], option: str, other_names: Mapping[str, str] | None = None) -> int:
    """Return the size of a feature in the first file that can be read.

    Args:
        files: Files of features.
        option: The option that names the extractor, for messages.
        other_names: See `by_name`.

    Raises:
        UserError: There is no file, or none of the first hundred can be read.
    """
    problem = ""
    for tried, path in enumerate(islice(files, _TRIED), 1):
        try:
            return features_of(by_name(load_arrays(path), other_names or {})).shape[1]
        except (DecodingError, ValueError) as error:
            problem = problem or f"{path.name}: {error}"
        last = tried
    if not problem:
        raise UserError(f"{option}: the manifest names no such files: leave it out")
    raise UserError(f"{option}: none of the first {last} files has features that can be read; {problem}")


def by_name(arrays: Mapping[str, np.ndarray], other_names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return the arrays under their first names. Raise ValueError if one is there under both."""
    twice = next((name for name, own in other_names.items() if name in arrays and own in arrays), None)
    if twice is not None:
        raise ValueError(f"it has both {twice} and {other_names[twice]}: keep one of them")
    return {other_names.get(name, name): array for name, array in arrays.items()}


def features_of(arrays: Mapping[str, np.ndarray], name: str = FEATURES) -> np.ndarray:
    """Return the features [R, N], of at least one row and one value."""
    features = numbers(arrays, name, 2)
    if not features.size:
        raise ValueError(f"{name} of shape {list(features.shape)}: there is nothing in it")
    return features


def numbers(arrays: Mapping[str, np.ndarray], name: str, ndim: int) -> np.ndarray:
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


def corners(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the corners in 0..1, float32 [R, 4], from norm_bb or from bbox and the size of the image."""
    if "norm_bb" not in arrays and "bbox" in arrays:
        return _corners_of_pixels(arrays)
    boxes = numbers(arrays, "norm_bb", 2).astype("float32")
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
    boxes = numbers(arrays, "bbox", 2).astype("float64")
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


def best_classes(arrays: Mapping[str, np.ndarray], count: int, num_classes: int) -> np.ndarray:
    """Return the most likely class of each of `count` regions, int16 [R], from soft_labels [R, K]."""
    soft = numbers(arrays, "soft_labels", 2)
    if len(soft) != count or not soft.shape[1]:
        raise ValueError(f"soft_labels of shape {list(soft.shape)}, not [{count}, K]")
    if soft.shape[1] > num_classes:
        raise ValueError(f"soft_labels of {soft.shape[1]} classes, not {num_classes}")
    check_range("soft_labels", soft)
    blank = np.flatnonzero(soft.max(1) <= 0)
    if len(blank):
        raise ValueError(f"soft_labels: row {blank[0]} gives no class any probability")
    return soft.argmax(1).astype("int16")


def check_range(name: str, array: np.ndarray) -> None:
    """Raise ValueError for values outside 0..1."""
    low, high = float(array.min(initial=0)), float(array.max(initial=0))
    if low < -BOX_TOLERANCE or high > 1 + BOX_TOLERANCE:
        raise ValueError(f"{name} runs from {low:g} to {high:g}, outside 0..1")


def as_float16(features: np.ndarray) -> np.ndarray:
    """Return the features as a store keeps them. Raise ValueError for values that float16 does not have."""
    with np.errstate(over="ignore"):
        stored = features.astype("float16")
    if not np.isfinite(stored).all():
        raise ValueError(f"features reach {np.abs(features).max():g}, beyond float16, whose largest value is 65504")
    return stored
