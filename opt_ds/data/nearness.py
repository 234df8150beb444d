"""How near two samples' texts are, and whether they have the same content: what a hard negative must be, and must not be.

Nearness is the cosine of hashed TF-IDF vectors of WordPieces (feature hashing: Weinberger et al. 2009), so that it costs a few
products whatever the size of the store.

Legend: b samples, k candidates.
"""

import numpy as np

from opt_ds.data.keyed import keyed_hash
from opt_ds.data.planned import IMAGE, TEXT
from opt_ds.store.reader import FeatureStore

_DIMENSIONS = 64


class Nearness:
    """Of the samples of one split. A sample without text is as near (0) to all."""

    def __init__(self, store: FeatureStore, samples: np.ndarray) -> None:
        """`samples`: int64 indices of the split's samples. Reads their texts and image codes once."""
        self._vectors = np.zeros((len(store.rows), _DIMENSIONS), dtype=np.float16)
        #: Hashes of text and picture, −1 where there is none.
        self._content = np.full((len(store.rows), 2), -1, dtype=np.int64)
        self._read(store, samples)

    def of(self, sample: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        """float32 [b, k], −1 … 1, of samples [b] and candidates [b, k]."""
        own, others = self._vectors[sample].astype(np.float32), self._vectors[candidate].astype(np.float32)
        return np.einsum("bd,bkd->bk", own, others)

    def same_content(self, sample: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        """bool [b, k]: their texts or their pictures (by the image codes, where there are any) are equal."""
        same = np.zeros(candidate.shape, dtype=bool)
        for column in range(2):
            own = self._content[sample, column][:, None]
            same |= (self._content[candidate, column] == own) & (own >= 0)
        return same

    def _read(self, store: FeatureStore, samples: np.ndarray) -> None:
        """Vectors of the texts; hashes of texts and pictures (by their image codes, where there are any)."""
        texts = np.unique(store.rows[samples, TEXT])
        texts = texts[texts >= 0]
        tokens = [store.text(int(row)).astype(np.int64) for row in texts]
        frequency = np.zeros(store.description.dims.vocab_size)
        for ids in tokens:
            frequency[np.unique(ids)] += 1
        rarity = np.log((1 + len(tokens)) / (1 + frequency))
        code = keyed_hash("tf-idf", np.arange(len(rarity)))
        place, sign = (code % np.uint64(_DIMENSIONS)).astype(np.int64), np.where(code >> np.uint64(63), 1.0, -1.0)
        number_of = np.full(int(texts.max(initial=-1)) + 1, -1, dtype=np.int64)
        number_of[texts] = np.arange(len(texts))
        vectors = np.zeros((len(texts), _DIMENSIONS))
        for vector, ids in zip(vectors, tokens, strict=True):
            np.add.at(vector, place[ids], sign[ids] * rarity[ids])
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        with_text = samples[store.rows[samples, TEXT] >= 0]
        self._vectors[with_text] = vectors[number_of[store.rows[with_text, TEXT]]]
        contents = np.array([_content(ids) for ids in tokens], dtype=np.int64)
        self._content[with_text, 0] = contents[number_of[store.rows[with_text, TEXT]]]
        if store.has_codes:
            for index in samples[store.rows[samples, IMAGE] >= 0]:
                self._content[index, 1] = _content(store.codes(int(store.rows[index, IMAGE])))


def _content(items: np.ndarray) -> int:
    """A hash of integers, 0 … 2^62 − 1, equal for equal ones."""
    places = keyed_hash("content", np.arange(len(items)), items.astype(np.int64))
    return int(np.bitwise_xor.reduce(places, initial=np.uint64(len(items))) >> np.uint64(2))
