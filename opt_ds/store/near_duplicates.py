"""Near-duplicates in a store: equal or nearly equal images, captions and audio, within a split and between two splits.

`same_content` defines equality. The store is read in blocks whose pages are released. Memory use is 8 bytes per row,
and 200 bytes per image that has pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from opt_ds.store.reader import FeatureStore
from opt_ds.store.same_content import (
    Groups,
    blank_images,
    block_colours,
    content_hash,
    difference_hashes,
    image_content,
    near_matches,
    plain_caption,
)
from opt_ds.store.schema import MISSING, MODALITIES

_BLOCK_IMAGES = 1024
_SHOWN_IDS = 3
_SHOWN_PAIRS = 10
_TEXT, _IMAGE, _AUDIO = range(len(MODALITIES))


@dataclass(frozen=True)
class SameImages:
    """Content ids, int64 per image row: equal if two images are the same, -1 if an image is blank."""

    identical: np.ndarray  # all pixels at 64 x 64 are equal; without pixels, the region features
    near: np.ndarray  # nearly equal, including identical ones; without pixels, the same as `identical`
    codes: np.ndarray | None  # all 64 image codes are equal; None without codes

    @property
    def num_blank(self) -> int:
        """Number of blank images."""
        return int((self.identical == MISSING).sum())


def same_images(store: FeatureStore) -> SameImages:
    """Compare all images of a store."""
    if not store.has_pixels:
        identical = _names(_image_feature_hashes(store))
        return SameImages(identical, identical, _same_codes(store, np.zeros(len(identical), bool)))
    exact, hashes, colours, blank = _pixel_hashes(store)
    identical = _names(exact)
    first = np.flatnonzero((identical == np.arange(len(identical))) & ~blank)
    near = identical.copy()
    near[first] = first[near_matches(hashes[first], colours[first])] if len(first) else first
    near = near[identical]  # copies get the id of the first identical image
    identical[blank] = near[blank] = MISSING
    return SameImages(identical, near, _same_codes(store, blank))


def near_duplicate_notes(store: FeatureStore) -> list[str]:
    """Return one line per kind of near-duplicate and pair of splits (or split) that has some."""
    images = same_images(store)
    exact = "identical pixels at 64 x 64" if store.has_pixels else "identical region features"
    notes = _notes(store, _IMAGE, images.identical, exact)
    if store.has_pixels:
        notes += _notes(store, _IMAGE, images.near, "nearly or fully identical pixels")
    if images.codes is not None:
        notes += _notes(store, _IMAGE, images.codes, "identical image codes")
    notes += _notes(store, _TEXT, _names(_caption_hashes(store)), "equal except for case, spaces and punctuation")
    notes += _notes(store, _AUDIO, _names(_frame_hashes(store)), "identical frames")
    if images.num_blank:
        notes.append(f"{images.num_blank} images are blank (nearly one colour) and are not compared for near-duplicates")
    return notes


def joined_groups(store: FeatureStore, near: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return the groups of these samples, merged if they share an image of `SameImages.near`; int64 [samples].

    The id of a merged group is the smallest code of its groups.
    """
    codes, place = np.unique(store.groups[samples], return_inverse=True)
    names = _of_samples(store, near)[samples]
    order = np.argsort(names, kind="stable")
    order = order[names[order] != MISSING]
    names, group_places = names[order], place[order]
    groups = Groups(len(codes))
    same = np.flatnonzero(names[1:] == names[:-1])
    for one, other in zip(group_places[same].tolist(), group_places[same + 1].tolist(), strict=True):
        groups.join(one, other)
    return codes[groups.names()][place]


def images_across_splits(store: FeatureStore, near: np.ndarray, splits: np.ndarray) -> int:
    """Return the number of images with a near-duplicate in another split.

    `splits` [N] holds the split of each sample. An image row that samples of several splits share is not counted, since
    it is a single image.
    """
    codes = np.unique(splits, return_inverse=True)[1]
    names, rows = _of_samples(store, near), np.array(store.rows[:, _IMAGE])
    uses = np.unique(np.stack([names, rows, codes])[:, names != MISSING], axis=1)  # [3, uses]: name, row, split
    of_name, first = np.unique(uses[0], return_index=True)
    if not len(of_name):
        return 0
    low, high = (function.reduceat(uses[2], first) for function in (np.minimum, np.maximum))
    several_rows = np.maximum.reduceat(uses[1], first) != np.minimum.reduceat(uses[1], first)
    wanted = of_name[(low != high) & several_rows]
    return len(np.unique(uses[1][np.isin(uses[0], wanted)]))


def _of_samples(store: FeatureStore, names: np.ndarray) -> np.ndarray:
    """Return the content id of each sample's image, int64 [N]; -1 if it has none or it is not compared."""
    rows = np.array(store.rows[:, _IMAGE])
    return np.where(rows >= 0, names[np.maximum(rows, 0)], MISSING) if len(names) else np.full(len(rows), MISSING)


def _notes(store: FeatureStore, modality: int, names: np.ndarray, how: str) -> list[str]:
    """Return one line per split, and per pair of splits, with equal contents.

    `names` are content ids per row of the modality, int64: equal if the contents are the same, -1 if not compared.
    `how` is the kind of equality, for the message.
    """
    what = ("captions", "images", "audio rows")[modality]
    splits = store.description.split_names
    uses = _Uses.of(store, modality, names)
    notes = []
    for code, split in enumerate(splits):
        if len(repeated := uses.repeated(code)):
            example = uses.example(store, repeated[0], code, code)
            notes.append(f"within {split} ({how}): {len(repeated)} of {uses.totals[code]} {what}, such as {example}")
    pairs = []
    for one, other in combinations(range(len(splits)), 2):
        if len(shared := uses.shared(one, other)):
            counts = " and ".join(
                f"{uses.count(shared, code)} of {uses.totals[code]} {what} in {splits[code]}" for code in (one, other)
            )
            examples = ", ".join(uses.example(store, name, one, other) for name in shared[:_SHOWN_IDS])
            pairs.append(f"between {splits[one]} and {splits[other]} ({how}): {counts}, such as {examples}")
    more = len(pairs) - _SHOWN_PAIRS
    rest = [f"between {more} more pairs of splits ({how})"] if more > 0 else []
    return [f"near-duplicates {line}" for line in (*notes, *pairs[:_SHOWN_PAIRS], *rest)]


@dataclass(frozen=True)
class _Uses:
    """The contents that splits use: one entry per row and split, independent of how many samples share the row."""

    names: np.ndarray  # int64 [uses], ascending
    splits: np.ndarray  # uint8 [uses]
    samples: np.ndarray  # int64 [uses], the first sample that uses the row
    totals: np.ndarray  # int64 [splits], number of rows per split, including rows that are not compared

    @classmethod
    def of(cls, store: FeatureStore, modality: int, names: np.ndarray) -> "_Uses":
        """Build from the content ids of a modality's rows."""
        rows, splits = np.array(store.rows[:, modality]), store.split_codes.astype("int64")
        samples = np.flatnonzero(rows >= 0)
        key = rows[samples] * len(store.description.split_names) + splits[samples]
        samples = samples[np.unique(key, return_index=True)[1]]
        totals = np.bincount(splits[samples], minlength=len(store.description.split_names))
        samples = samples[names[rows[samples]] != MISSING]
        samples = samples[np.argsort(names[rows[samples]], kind="stable")]
        return cls(names[rows[samples]], store.split_codes[samples], samples, totals)

    def repeated(self, code: int) -> np.ndarray:
        """Return the content id of each use in a split that has another use in the same split."""
        own = self.names[self.splits == code]
        found, counts = np.unique(own, return_counts=True)
        return own[np.isin(own, found[counts > 1])]

    def shared(self, one: int, other: int) -> np.ndarray:
        """Return the content ids that both splits use."""
        return np.intersect1d(self.names[self.splits == one], self.names[self.splits == other])

    def count(self, names: np.ndarray, code: int) -> int:
        """Return how many uses in a split have one of these content ids."""
        return int(np.isin(self.names[self.splits == code], names).sum())

    def example(self, store: FeatureStore, name: int, one: int, other: int) -> str:
        """Return the ids of two samples that use this content.

        There is one per split, or the first two if both splits are the same.
        """
        start, stop = np.searchsorted(self.names, (name, name + 1))
        samples, splits = self.samples[start:stop], self.splits[start:stop]
        first = samples[splits == one][0]
        second = samples[splits == other][1 if one == other else 0]
        return f'"{store.sample_id(first)}" and "{store.sample_id(second)}"'


def _names(hashes: np.ndarray) -> np.ndarray:
    """Return the index of the first equal hash for each hash, int64 [n]."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse].astype("int64")


def _pixel_hashes(store: FeatureStore) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return hash of the pixels, difference hash, mean block colours and blankness per image row."""
    blocks = [
        (
            np.array([content_hash(image.tobytes()) for image in pixels], "uint64"),
            difference_hashes(pixels),
            block_colours(pixels),
            blank_images(pixels),
        )
        for pixels in _image_blocks(store, "image/pixels")
    ]
    if not blocks:
        return np.zeros(0, "uint64"), np.zeros(0, "uint64"), np.zeros((0, 192), "uint8"), np.zeros(0, bool)
    exact, hashes, colours, blank = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return exact, hashes, colours, blank


def _same_codes(store: FeatureStore, blank: np.ndarray) -> np.ndarray | None:
    """Return content ids by image codes; -1 for blank images and for images with a single repeated code."""
    if not store.has_codes:
        return None
    hashes, uniform = [np.zeros(0, "uint64")], [np.zeros(0, bool)]
    for codes in _image_blocks(store, "image/codes"):
        hashes.append(np.array([content_hash(image.tobytes()) for image in codes], "uint64"))
        uniform.append((codes == codes[:, :1]).all(1))
    names = _names(np.concatenate(hashes))
    names[blank | np.concatenate(uniform)] = MISSING
    return names


def _image_blocks(store: FeatureStore, dataset: str) -> Iterator[np.ndarray]:
    for index, shard in enumerate(store.description.shards):
        for start in range(0, shard.num_images, _BLOCK_IMAGES):
            yield np.asarray(store.shard(index).array(dataset)[start : start + _BLOCK_IMAGES])
            store.release_pages()


def _image_feature_hashes(store: FeatureStore) -> np.ndarray:
    return _row_hashes(store, "image", lambda row: image_content(store.region_features(row)))


def _frame_hashes(store: FeatureStore) -> np.ndarray:
    return _row_hashes(store, "audio", lambda row: store.frames(row).tobytes())


def _caption_hashes(store: FeatureStore) -> np.ndarray:
    return _row_hashes(store, "text", lambda row: plain_caption(store.caption(row)).encode())


def _row_hashes(store: FeatureStore, modality: str, content: Callable[[int], bytes]) -> np.ndarray:
    count = store.description.num_rows(modality)
    hashes = np.zeros(count, "uint64")
    for row in range(count):
        hashes[row] = content_hash(content(row))
        if row % _BLOCK_IMAGES == 0:
            store.release_pages()
    return hashes
