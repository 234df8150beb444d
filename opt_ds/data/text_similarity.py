"""Text similarity of two samples, and whether they have the same content: the criteria for hard negatives.

The similarity is the cosine of hashed TF-IDF vectors of WordPieces (feature hashing: Weinberger et al. 2009). It takes
a few products, whatever the size of the store.

Legend: b samples, k candidates.
"""

from typing import Any

import numpy as np

from opt_ds.data.derived import cached_array
from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.ops.keyed import keyed_hash
from opt_ds.store.reader import FeatureStore

_DIMENSIONS = 64
_BLOCK = 4096  # texts


class TextSimilarity:
    """Text similarity of the samples of one split. A sample without text has similarity 0 to all others."""

    def __init__(self, store: FeatureStore, samples: np.ndarray, key: list[Any]) -> None:
        """Read texts and image codes, once per store.

        Args:
            store: The store.
            samples: int64 indices of the split's samples.
            key: What `samples` depends on besides the store (see `data.derived`).
        """

        def vectors() -> np.ndarray:
            return _vectors(store, samples)

        def content() -> np.ndarray:
            return _contents(store, samples)

        self._vectors = cached_array(store, "vectors", key, vectors)  # float16 [samples of the store, _DIMENSIONS]
        #: int64 [samples of the store, 2], hashes of text and image; −1 if absent.
        self._content = cached_array(store, "contents", key, content)

    def of(self, sample: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        """Return the similarity of samples [b] and candidates [b, k], float32 [b, k] in −1 … 1."""
        own, others = self._vectors[sample].astype(np.float32), self._vectors[candidate].astype(np.float32)
        return np.einsum("bd,bkd->bk", own, others)

    def same_content(self, sample: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        """Return whether texts or images (compared by image codes, if there are any) are equal, bool [b, k]."""
        same = np.zeros(candidate.shape, dtype=bool)
        for column in range(2):
            own = self._content[sample, column][:, None]
            same |= (self._content[candidate, column] == own) & (own >= 0)
        return same


def _vectors(store: FeatureStore, samples: np.ndarray) -> np.ndarray:
    """Return the TF-IDF vectors of the samples' texts, float16, 0 elsewhere."""
    texts = _texts(store, samples)
    frequency = np.zeros(store.description.dims.vocab_size)
    for row in texts.tolist():
        frequency[np.unique(store.text(row).astype(np.int64))] += 1
    rarity = np.log((1 + len(texts)) / (1 + frequency))
    code = keyed_hash("tf-idf", np.arange(len(rarity)))
    place, sign = (code % np.uint64(_DIMENSIONS)).astype(np.int64), np.where(code >> np.uint64(63), 1.0, -1.0)
    of_text = np.zeros((len(texts), _DIMENSIONS), np.float16)
    for start in range(0, len(texts), _BLOCK):
        rows = texts[start : start + _BLOCK].tolist()
        block = np.zeros((len(rows), _DIMENSIONS))
        for vector, row in zip(block, rows, strict=True):
            ids = store.text(row).astype(np.int64)
            np.add.at(vector, place[ids], sign[ids] * rarity[ids])
        block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-9)
        of_text[start : start + len(rows)] = block
    vectors = np.zeros((len(store.rows), _DIMENSIONS), dtype=np.float16)
    with_text = samples[store.rows[samples, TEXT] >= 0]
    vectors[with_text] = of_text[np.searchsorted(texts, store.rows[with_text, TEXT])]
    return vectors


def _contents(store: FeatureStore, samples: np.ndarray) -> np.ndarray:
    """Return hashes of the samples' texts and images (by image codes, if there are any), −1 elsewhere."""
    contents = np.full((len(store.rows), 2), -1, dtype=np.int64)
    texts = _texts(store, samples)
    of_text = np.array([_content(store.text(row)) for row in texts.tolist()], dtype=np.int64)
    with_text = samples[store.rows[samples, TEXT] >= 0]
    contents[with_text, 0] = of_text[np.searchsorted(texts, store.rows[with_text, TEXT])]
    if store.has_codes:
        for index in samples[store.rows[samples, IMAGE] >= 0]:
            contents[index, 1] = _content(store.codes(int(store.rows[index, IMAGE])))
    return contents


def _texts(store: FeatureStore, samples: np.ndarray) -> np.ndarray:
    """Return the text rows of the samples, ascending and unique."""
    rows = np.unique(store.rows[samples, TEXT])
    return rows[rows >= 0]


def _content(items: np.ndarray) -> int:
    """Return a hash of integers, 0 … 2^62 − 1. Equal arrays have equal hashes."""
    places = keyed_hash("content", np.arange(len(items)), items.astype(np.int64))
    return int(np.bitwise_xor.reduce(places, initial=np.uint64(len(items))) >> np.uint64(2))
