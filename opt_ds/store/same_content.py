"""Decide which images, captions and audio are the same.

This module handles hashes and arrays; `near_duplicates` reads stores. Two images match nearly if a 64-bit difference
hash and the mean colours of 8 x 8 blocks agree, up to a change of brightness or contrast. The hash only proposes pairs.
The colours decide, so that drawings that differ in one colour are not merged. An image without contrast ("blank") never
matches another one, because empty placeholders would connect unrelated samples. Cropped copies, and copies so bright
that parts turn white, are not found.

n is the number of images; pixels are uint8 [n, 3, 64, 64].
"""

import hashlib
import unicodedata

import numpy as np

HASH_BYTES = 8
_HASH_ROWS, _HASH_COLUMNS = 8, 9
_STEP = 3.0  # grey levels by which a block must exceed its left neighbour to set a bit; above the noise of JPEG
_MAX_DISTANCE = 6  # bits
_ROTATIONS = range(0, 64, 8)
_NEIGHBOURS = 32  # images compared with each image, per rotation of the hash
_MAX_RESIDUAL = 8.0  # grey levels, in any block and channel
_MAX_GAIN = 1.5  # largest change of contrast
_MIN_CONTRAST = 3.0  # grey levels; smallest standard deviation of an image that is not blank
_SIDE = 8  # blocks per side
_PAIRS_AT_ONCE = 65_536
_BITS_OF_BYTE = np.array([value.bit_count() for value in range(256)], "uint8")


def content_hash(content: bytes) -> int:
    """Return an unsigned 64-bit hash of the bytes."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=HASH_BYTES).digest(), "little")


def image_content(region_features: np.ndarray) -> bytes:
    """Return bytes that identify an image in any store, with or without pixels: its region features."""
    return region_features.tobytes()


def plain_caption(caption: str) -> str:
    """Return a caption without case, punctuation and repeated spaces. A caption of symbols only keeps them."""
    folded = unicodedata.normalize("NFKC", caption).casefold()
    words = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded).split()
    return " ".join(words or folded.split())


def difference_hashes(pixels: np.ndarray) -> np.ndarray:
    """Return difference hashes, uint64 [n].

    They have one bit per position of an 8 x 8 grid, set if brightness rises from left to right.
    """
    grey = np.tensordot(pixels.astype("float32"), np.array([0.299, 0.587, 0.114], "float32"), axes=(1, 0))
    blocks = _averages(_HASH_ROWS) @ grey @ _averages(_HASH_COLUMNS).T
    bits = (np.diff(blocks, axis=2) > _STEP).reshape(len(pixels), 64)
    return np.packbits(bits, axis=1).view("uint64").reshape(-1)


def block_colours(pixels: np.ndarray) -> np.ndarray:
    """Return the mean of each block and channel, uint8 [n, 192]."""
    size = pixels.shape[-1] // _SIDE
    blocks = pixels.reshape(len(pixels), 3, _SIDE, size, _SIDE, size).mean((3, 5), dtype="float32")
    return np.rint(blocks).astype("uint8").reshape(len(pixels), -1)


def blank_images(pixels: np.ndarray) -> np.ndarray:
    """Return which images have nearly one colour, bool [n]."""
    return pixels.reshape(len(pixels), 3, -1).std(2, dtype="float32").max(1) < _MIN_CONTRAST


def same_colours(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return which block colours [pairs, 192] agree after the best change of brightness and contrast, bool [pairs]."""
    x, y = one.astype("float32"), other.astype("float32")
    x -= x.mean(1, keepdims=True)
    y -= y.mean(1, keepdims=True)
    # Half of the gain is applied to each side, so that the result does not depend on the order of the two.
    gain = np.sqrt((y.std(1) + 1e-6) / (x.std(1) + 1e-6))[:, None]
    residual = np.abs(y / gain - gain * x).max(1)
    return (residual <= _MAX_RESIDUAL) & (np.abs(np.log(gain[:, 0])) <= np.log(_MAX_GAIN) / 2)


class Groups:
    """Union-find over `count` items. The id of a group is its smallest item."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def join(self, one: int, other: int) -> None:
        """Merge the groups of two items."""
        first, second = self._root(one), self._root(other)
        self._parent[max(first, second)] = min(first, second)

    def names(self) -> np.ndarray:
        """Return the smallest item of each item's group, int64 [count]."""
        while True:
            shorter = self._parent[self._parent]
            if np.array_equal(shorter, self._parent):
                return shorter
            self._parent = shorter

    def _root(self, item: int) -> int:
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = int(parent[item])
        return item


def near_matches(hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Return group ids, int64 [n], equal for images that match nearly, directly or through other images.

    The hashes are sorted once per rotation by one byte, and each is compared with those that follow it. The cost is O(n
    log n). Images that differ in a few bits are neighbours in one of the orders. With more than 32 equal hashes some
    pairs may be missed.

    Args:
        hashes: uint64 [n], see `difference_hashes`.
        colours: uint8 [n, 192], see `block_colours`.
    """
    groups = Groups(len(hashes))
    for rotation in _ROTATIONS:
        turned = hashes if rotation == 0 else (hashes << np.uint64(rotation)) | (hashes >> np.uint64(64 - rotation))
        order = np.argsort(turned, kind="stable")
        ordered = hashes[order]
        names = groups.names()[order]
        for step in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
            close = _distance(ordered[step:], ordered[:-step]) <= _MAX_DISTANCE
            close &= names[step:] != names[:-step]
            _join_pairs(groups, colours, order, np.flatnonzero(close), step)
    return groups.names()


def _join_pairs(groups: Groups, colours: np.ndarray, order: np.ndarray, places: np.ndarray, step: int) -> None:
    for start in range(0, len(places), _PAIRS_AT_ONCE):
        some = places[start : start + _PAIRS_AT_ONCE]
        one, other = order[some], order[some + step]
        same = same_colours(colours[one], colours[other])
        for first, second in zip(one[same].tolist(), other[same].tolist(), strict=True):
            groups.join(first, second)


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return _BITS_OF_BYTE[(one ^ other).view("uint8").reshape(-1, HASH_BYTES)].sum(1, dtype="uint8")


def _averages(count: int, side: int = 64) -> np.ndarray:
    """Return an averaging matrix, float32 [count, side].

    Row i averages the i-th of `count` equal parts of a line of `side` pixels.
    """
    bounds = np.linspace(0, side, count + 1)
    pixel = np.arange(side)
    covered = np.minimum(bounds[1:, None], pixel + 1) - np.maximum(bounds[:-1, None], pixel)
    return (np.clip(covered, 0, 1) * count / side).astype("float32")
