"""Rules for the values of a store: finite, in range, rising offsets, existing rows, consistent boxes.

`inspect` applies them to complete shards, training to a store before its first start, and preparation to every item
before it is written. A store that passes preparation therefore passes the other checks. Problems are parts of a line,
such as "value 7 in row 3 is outside 0..1".
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from opt_ds.store.schema import (
    BOX_SIZE,
    CODES_PER_IMAGE,
    DATASETS,
    MISSING,
    PIXELS_SHAPE,
    FurtherModality,
    ShardDescription,
    StoreDescription,
)

_BLOCK_ROWS = 65_536
BOX_TOLERANCE = 1e-3  # boxes are float32, but some detectors compute in half precision

# Dataset of offsets -> the dataset that they divide into items. Other "<modality>/offsets" divide "<modality>/features".
_OFFSETS_OF = {
    "samples/id_offsets": "samples/id",
    "samples/label_offsets": "samples/labels",
    "text/offsets": "text/tokens",
    "text/utf8_offsets": "text/utf8",
}
# Dataset -> smallest and largest allowed value.
RANGES: dict[str, Callable[[ShardDescription, StoreDescription], tuple[float, float]]] = {
    "samples/split": lambda shard, store: (0, len(store.split_names) - 1),
    "samples/labels": lambda shard, store: (0, len(store.label_names) - 1),
    "samples/group": lambda shard, store: (0, 2**63 - 1),
    "text/tokens": lambda shard, store: (0, store.dims.vocab_size - 1),
    "image/boxes": lambda shard, store: (-BOX_TOLERANCE, 1 + BOX_TOLERANCE),
    "image/labels": lambda shard, store: (0, max(store.dims.image_num_classes - 1, 0)),  # without classes all are 0
    "image/scores": lambda shard, store: (0, 1),
    "image/codes": lambda shard, store: (0, (store.dims.num_codes or 0) - 1),
}


def divided_by(offsets: str) -> str | None:
    """Return the dataset that a dataset of offsets divides into items; None if it does not contain offsets."""
    if offsets in _OFFSETS_OF:
        return _OFFSETS_OF[offsets]
    return offsets.replace("/offsets", "/features") if offsets.endswith("/offsets") else None


def is_never_empty(offsets: str) -> bool:
    """Return whether this dataset contains offsets whose items all have at least one element, as rows of modalities have."""
    return offsets.endswith("/offsets")


def not_finite(array: np.ndarray) -> str | None:
    """Return where a float array [rows, …] first has NaN or infinity; None if nowhere, or if the dtype is not float."""
    if array.dtype.kind != "f":
        return None
    for start, block in _blocks(array):
        bad = ~np.isfinite(block)
        if bad.any():
            row = start + int(np.flatnonzero(bad.reshape(len(block), -1).any(1))[0])
            return f"NaN or infinite, first in row {row}"
    return None


def out_of_range(array: np.ndarray, low: float, high: float) -> Iterator[str]:
    """Yield the first value outside low..high and its row, if there is one."""
    for start, block in _blocks(array):
        bad = (block < low) | (block > high)
        if bad.any():
            row = start + int(np.flatnonzero(bad.reshape(len(block), -1).any(1))[0])
            yield f"value {block[bad].flat[0]} in row {row} is outside {low:g}..{high:g}"
            return


def offset_problems(offsets: np.ndarray, length: int) -> Iterator[str]:
    """Yield what is wrong with offsets [items + 1] into `length` elements."""
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != length:
        yield f"does not run from 0 to {length}"
    elif (falls := offsets[1:] < offsets[:-1]).any():  # comparing differences would fail where they wrap around
        yield f"falls after item {int(np.flatnonzero(falls)[0])}"


def empty_items(offsets: np.ndarray) -> Iterator[str]:
    """Yield the first item of offsets [items + 1] that has no element."""
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if len(empty):
        yield f"item {int(empty[0])} is empty"


def box_problems(array: np.ndarray) -> Iterator[str]:
    """Yield the first of boxes [R, 7] whose width, height and area do not follow from its corners."""
    for start, boxes in _blocks(array):
        x1, y1, x2, y2, width, height, area = boxes[:].T
        wrong = np.abs(np.stack([x2 - x1 - width, y2 - y1 - height, width * height - area])) > BOX_TOLERANCE
        bad = wrong.any(0) | (width < 0) | (height < 0)
        if bad.any():
            yield f"row {start + int(np.flatnonzero(bad)[0])}: width, height or area do not follow from the corners"
            return


def corner_problems(corners: np.ndarray) -> Iterator[str]:
    """Yield what is wrong with corners [R, 4] (x1, y1, x2, y2). They must be in 0..1 up to errors of half precision."""
    if not_finite(corners) is not None:
        yield f"boxes: {not_finite(corners)}"
        return
    largest = float(corners.max(initial=0))
    if largest > 2:
        yield f"boxes reach {largest:g}: they are in pixels, not divided by the image's width and height"
        return
    yield from (f"boxes: {problem}" for problem in out_of_range(corners, -BOX_TOLERANCE, 1 + BOX_TOLERANCE))
    crossed = np.flatnonzero((corners[:, 2] < corners[:, 0]) | (corners[:, 3] < corners[:, 1]))
    if len(crossed):
        x1, y1, x2, y2 = corners[crossed[0]]
        yield f"boxes: row {crossed[0]} ends before it begins (x {x1:g} to {x2:g}, y {y1:g} to {y2:g})"


def row_problems(rows: np.ndarray, counts: dict[str, int]) -> Iterator[str]:
    """Yield what is wrong with `rows` [N, M] of modalities with these numbers of rows.

    That is the first sample with a row that the shard does not have, and the first without any modality.
    """
    for column, (modality, count) in enumerate(counts.items()):
        bad = (rows[:, column] < MISSING) | (rows[:, column] >= count)
        if bad.any():
            yield f"sample {int(np.flatnonzero(bad)[0])}: no {modality} row {int(rows[bad, column][0])}"
    empty = (rows == MISSING).all(1)
    if empty.any():
        yield f"sample {int(np.flatnonzero(empty)[0])} has no modality at all"


def _blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), _BLOCK_ROWS):
        yield start, array[start : start + _BLOCK_ROWS]


class Regions(Protocol):
    """The regions of one image, as `ImageItem` and the extractors' `RegionFeatures` store them."""

    @property
    def features(self) -> np.ndarray:
        """Features [R, Dv]."""
        ...

    @property
    def boxes(self) -> np.ndarray:
        """Boxes [R, 7]: x1, y1, x2, y2, w, h, w*h in 0..1."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """Class of each region, [R]."""
        ...

    @property
    def scores(self) -> np.ndarray:
        """Confidence of each region in 0..1, [R]."""
        ...


def image_problem(regions: Regions, feature_dim: int, num_classes: int) -> str | None:
    """Return why a store could not hold the regions of an image (see `ImageItem`); None if it can.

    Without classes (`num_classes` 0), every label must be 0.

    Values are checked as they would be stored: a feature that overflows float16 is infinite.
    """
    problem = item_problem("image/features", regions.features, (None, feature_dim))
    if problem is not None:
        return problem
    count = len(regions.features)
    low, high = -BOX_TOLERANCE, 1 + BOX_TOLERANCE
    return (
        item_problem("image/boxes", regions.boxes, (count, BOX_SIZE), low, high)
        or next((f"boxes: {problem}" for problem in box_problems(regions.boxes.astype("float32"))), None)
        or item_problem("image/labels", regions.labels, (count,), 0, max(num_classes - 1, 0))
        or item_problem("image/scores", regions.scores, (count,), 0, 1)
    )


def audio_problem(frames: np.ndarray, feature_dim: int) -> str | None:
    """Return why a store could not hold audio frames [T, Da]; None if it can."""
    return item_problem("audio/features", frames, (None, feature_dim))


def further_problem(columns: object, modality: FurtherModality) -> str | None:
    """Return why a store could not hold a row of a further modality, a dict of its columns; None if it can."""
    if not isinstance(columns, dict):
        return f"{type(columns).__name__}, not a dict of columns"
    if columns.keys() != modality.columns.keys():
        return f"columns {', '.join(map(str, columns)) or 'none'}, not {', '.join(modality.columns)}"
    if not all(isinstance(array, np.ndarray) for array in columns.values()):
        return "columns that are no NumPy arrays"
    count = None  # the first column may have any length but 0; the others must have the same
    for name, stored in modality.columns.items():
        problem = item_problem(name, columns[name], (count, *stored.width), dtype=stored.dtype)
        if problem is not None:
            return problem
        count = len(columns[name])
    return None


def text_problem(tokens: np.ndarray, vocab_size: int) -> str | None:
    """Return why a store could not hold the tokens [L] of a text; None if it can."""
    return item_problem("text/tokens", tokens, (None,), 0, vocab_size - 1)


def codes_problem(codes: np.ndarray, num_codes: int | None) -> str | None:
    """Return why a store could not hold the codes [64] of an image; None if it can.

    `num_codes` None: a store without codes.
    """
    return item_problem("image/codes", codes, (CODES_PER_IMAGE,), 0, (num_codes or 0) - 1)


def pixels_problem(pixels: np.ndarray) -> str | None:
    """Return why a store could not hold the pixels of an image; None if it can."""
    return item_problem("image/pixels", pixels, PIXELS_SHAPE, 0, 255)


def item_problem(
    name: str,
    array: np.ndarray,
    shape: tuple[int | None, ...],
    low: float = -np.inf,
    high: float = np.inf,
    dtype: str | None = None,
) -> str | None:
    """Return why an array cannot be an item of a dataset; None if it can.

    Args:
        name: The dataset.
        array: The item.
        shape: The required shape; None stands for any length except 0.
        low: Smallest allowed value.
        high: Largest allowed value.
        dtype: The dataset's dtype; None for that of a built-in dataset.
    """
    what = name.rpartition("/")[2]
    stored = np.dtype(dtype or DATASETS[name])
    if array.dtype.kind not in ("iu" if stored.kind in "iu" else "fiu"):
        return f"{what} of dtype {array.dtype}, not {'integers' if stored.kind in 'iu' else 'numbers'}"
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("N" if size is None else str(size) for size in shape)
        return f"{what} of shape {list(array.shape)}, not [{wanted}]"
    if not len(array):
        return f"{what} are empty"
    with np.errstate(over="ignore"):
        kept = array.astype(stored, copy=False)
    if (problem := not_finite(array)) is not None:
        return f"{what}: {problem}"
    if not_finite(kept) is not None:
        most = max(abs(float(array.min())), abs(float(array.max())))
        return f"{what}: {most:g} is beyond {stored}, whose largest value is {np.finfo(stored).max:g}"
    problem = next(out_of_range(array, low, high), None)
    if problem is None and stored.kind in "iu" and not np.array_equal(kept, array):
        problem = f"values do not fit {stored}"
    return None if problem is None else f"{what}: {problem}"
