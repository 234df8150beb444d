"""What every value of a store must satisfy: finite, within range, offsets that rise, rows that exist, boxes that agree.

`inspect` asks it of whole shards, training of a store before its first start, and preparation of every item before it is
written, so that no store is made that the others refuse. A problem is part of a line: "value 7 in row 3 is outside 0..1".
"""

from collections.abc import Callable, Iterator

import numpy as np

from opt_ds.store.schema import MISSING, MODALITIES, ShardDescription, StoreDescription

_BLOCK_ROWS = 65_536
BOX_TOLERANCE = 1e-3  # boxes are float32, but some detectors work in half precision

# Dataset of offsets -> the dataset that they cut into items.
OFFSETS_OF = {
    "samples/id_offsets": "samples/id",
    "samples/label_offsets": "samples/labels",
    "text/offsets": "text/tokens",
    "text/utf8_offsets": "text/utf8",
    "image/offsets": "image/features",
    "audio/offsets": "audio/features",
}
# Dataset -> the smallest and largest value allowed.
RANGES: dict[str, Callable[[ShardDescription, StoreDescription], tuple[float, float]]] = {
    "samples/split": lambda shard, store: (0, len(store.split_names) - 1),
    "samples/labels": lambda shard, store: (0, len(store.label_names) - 1),
    "samples/group": lambda shard, store: (0, 2**63 - 1),
    "text/tokens": lambda shard, store: (0, store.dims.vocab_size - 1),
    "image/boxes": lambda shard, store: (-BOX_TOLERANCE, 1 + BOX_TOLERANCE),
    "image/labels": lambda shard, store: (0, store.dims.image_num_classes - 1),
    "image/scores": lambda shard, store: (0, 1),
    "image/codes": lambda shard, store: (0, (store.dims.num_codes or 0) - 1),
}


def not_finite(array: np.ndarray) -> str | None:
    """Return where a float array [rows, …] first has NaN or infinity; None if nowhere, or for another dtype."""
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
    elif (falls := offsets[1:] < offsets[:-1]).any():  # not their differences, which may wrap around
        yield f"falls after item {int(np.flatnonzero(falls)[0])}"


def box_problems(array: np.ndarray) -> Iterator[str]:
    """Yield the first of boxes [R, 7] whose width, height and area do not follow from its corners."""
    for start, boxes in _blocks(array):
        x1, y1, x2, y2, width, height, area = boxes[:].T
        wrong = np.abs(np.stack([x2 - x1 - width, y2 - y1 - height, width * height - area])) > BOX_TOLERANCE
        bad = wrong.any(0) | (width < 0) | (height < 0)
        if bad.any():
            yield f"row {start + int(np.flatnonzero(bad)[0])}: width, height or area do not follow from the corners"
            return


def row_problems(rows: np.ndarray, shard: ShardDescription) -> Iterator[str]:
    """Yield samples of `rows` [N, 3] that name a row which the shard does not have, or no row at all."""
    for column, count in enumerate((shard.num_texts, shard.num_images, shard.num_audios)):
        bad = (rows[:, column] < MISSING) | (rows[:, column] >= count)
        if bad.any():
            yield f"sample {int(np.flatnonzero(bad)[0])}: no {MODALITIES[column]} row {int(rows[bad, column][0])}"
    empty = (rows == MISSING).all(1)
    if empty.any():
        yield f"sample {int(np.flatnonzero(empty)[0])} has no modality at all"


def _blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), _BLOCK_ROWS):
        yield start, array[start : start + _BLOCK_ROWS]
