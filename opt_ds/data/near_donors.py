"""Hard negatives for retrieval: of some drawn donors, the one whose text is nearest to the sample's own.

Nearness is the cosine of hashed TF-IDF vectors of WordPieces (feature hashing: Weinberger et al. 2009), so that a donor costs a
few dot products whatever the size of the store. The choice is a function of the sample's key.

Legend: b samples, k candidates.
"""

import numpy as np

from opt_ds.data.keyed import keyed_choice, keyed_hash
from opt_ds.data.planned import IMAGE, TEXT
from opt_ds.store.reader import FeatureStore

_DIMENSIONS = 64


class NearDonors:
    """The samples of one split that can give a modality to another sample of it."""

    def __init__(self, store: FeatureStore, samples: np.ndarray, candidates: int, same_group: bool) -> None:
        """`samples`: int64 indices of the split's samples; `candidates`: how many are drawn for each sample that wants one;
        `same_group`: every other one of them is of the sample's own group (else none is)."""
        self._rows, self._groups = store.rows, store.groups
        self._candidates, self._same_group = candidates, same_group
        self._givers = [samples[store.rows[samples, modality] >= 0] for modality in range(3)]
        self._vectors = np.zeros((len(store.rows), _DIMENSIONS), dtype=np.float16)
        #: What must differ between a sample and its donor: equal texts and pictures are no negatives.
        self._content = np.full((len(store.rows), 2), -1, dtype=np.int64)
        self._read(store, samples)
        self._by_group = [givers[np.argsort(store.groups[givers], kind="stable")] for givers in self._givers]

    def replace(
        self, rows: np.ndarray, replaced: np.ndarray, sample: np.ndarray, key: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows [b, 3] with modality `replaced` [b] (−1: none) taken from donors; and bool [b], False where none will do."""
        rows, found = rows.copy(), np.ones(len(rows), dtype=bool)
        for modality in range(3):
            who = np.flatnonzero(replaced == modality)
            if not who.size:
                continue
            if not len(self._givers[modality]):
                found[who] = False
                continue
            candidate = self._drawn(modality, sample[who], key[who])
            near = np.einsum(
                "bd,bkd->bk", self._vectors[sample[who]].astype(np.float32), self._vectors[candidate].astype(np.float32)
            )
            near[self._refused(modality, candidate, sample[who])] = -np.inf
            best = near.argmax(1)
            donor = np.take_along_axis(candidate, best[:, None], axis=1)[:, 0]
            found[who] = np.isfinite(near.max(1))
            rows[who, modality] = np.where(found[who], self._rows[donor, modality], rows[who, modality])
        return rows, found

    def _drawn(self, modality: int, sample: np.ndarray, key: np.ndarray) -> np.ndarray:
        """int64 [b, k], drawn donors."""
        givers = self._givers[modality]
        number = np.arange(self._candidates)[None]
        candidate = givers[keyed_choice(len(givers), key[:, None], "near", number)]
        if self._same_group:
            by_group = self._by_group[modality]
            groups = self._groups[by_group]
            first = np.searchsorted(groups, self._groups[sample], "left")
            size = np.searchsorted(groups, self._groups[sample], "right") - first
            place = first[:, None] + keyed_choice(np.maximum(size, 1)[:, None], key[:, None], "group", number)
            own = (number % 2 == 0) & (size > 0)[:, None]
            candidate = np.where(own, by_group[np.minimum(place, len(by_group) - 1)], candidate)
        return candidate

    def _refused(self, modality: int, candidate: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """bool [b, k]: candidates that belong to the sample as well as its own part does."""
        refused = self._rows[candidate, modality] == self._rows[sample, modality][:, None]
        for column in range(2):
            own = self._content[sample, column][:, None]
            refused |= (self._content[candidate, column] == own) & (own >= 0)
        if not self._same_group:
            refused |= self._groups[candidate] == self._groups[sample][:, None]
        return refused

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
