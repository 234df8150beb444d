"""Hard negatives for retrieval: of several sampled negatives, the one whose text is most similar to the sample's own.

The choice is a function of the sample's key.

Legend: b samples, k candidates.
"""

from functools import partial
from typing import Any

import numpy as np

from opt_ds.data.derived import cached_array
from opt_ds.data.modalities import MODALITIES
from opt_ds.data.text_similarity import TextSimilarity
from opt_ds.ops.keyed import keyed_choice
from opt_ds.store.reader import FeatureStore


class HardNegativeSampler:
    """Hard-negative sampler over the samples of one split."""

    def __init__(
        self, store: FeatureStore, samples: np.ndarray, candidates: int, same_group: bool, key: list[Any]
    ) -> None:
        """Derive the arrays that sampling requires from the complete split, once per store.

        Args:
            store: The store.
            samples: int64 indices of the split's samples.
            candidates: Number of candidates sampled for each hard negative.
            same_group: If true, every other candidate is of the sample's own group; otherwise none is.
            key: What `samples` depends on besides the store (see `data.derived`).
        """
        self._rows, self._groups = store.rows, store.groups
        self._candidates, self._same_group = candidates, same_group
        self._providers, self._by_group = [], []
        for modality in MODALITIES:
            providers = cached_array(store, "givers", [*key, modality], partial(_providers, store, samples, modality))
            self._providers.append(providers)
            self._by_group.append(cached_array(store, "by-group", [*key, modality], partial(_by_group, store, providers)))
        self._similarity = TextSimilarity(store, samples, key)

    def replace(
        self, rows: np.ndarray, replaced: np.ndarray, sample: np.ndarray, key: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replace modality `replaced` [b] (−1: none) by that of a hard negative.

        Args:
            rows: int64 [b, M], rows of the samples.
            replaced: int64 [b], the modality to replace.
            sample: int64 [b], sample indices.
            key: uint64 [b], keys of the random choices.

        Returns:
            Rows int64 [b, M]; and bool [b], false if no candidate is allowed.
        """
        rows, found = rows.copy(), np.ones(len(rows), dtype=bool)
        for modality in MODALITIES:
            who = np.flatnonzero(replaced == modality)
            if not who.size:
                continue
            if not len(self._providers[modality]):
                found[who] = False
                continue
            candidate = self._sampled(modality, sample[who], key[who])
            near = self._similarity.of(sample[who], candidate)
            near[self._refused(modality, candidate, sample[who])] = -np.inf
            best = near.argmax(1)
            negative = np.take_along_axis(candidate, best[:, None], axis=1)[:, 0]
            found[who] = np.isfinite(near.max(1))
            rows[who, modality] = np.where(found[who], self._rows[negative, modality], rows[who, modality])
        return rows, found

    def _sampled(self, modality: int, sample: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Return the sampled candidates, int64 [b, k]."""
        providers = self._providers[modality]
        number = np.arange(self._candidates)[None]
        candidate = providers[keyed_choice(len(providers), key[:, None], "near", number)]
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
        """Return which candidates match the sample as well as its own modality does, bool [b, k]."""
        refused = self._rows[candidate, modality] == self._rows[sample, modality][:, None]
        refused |= self._similarity.same_content(sample, candidate)
        if not self._same_group:
            refused |= self._groups[candidate] == self._groups[sample][:, None]
        return refused


def _providers(store: FeatureStore, samples: np.ndarray, modality: int) -> np.ndarray:
    return samples[store.rows[samples, modality] >= 0]


def _by_group(store: FeatureStore, providers: np.ndarray) -> np.ndarray:
    return providers[np.argsort(store.groups[providers], kind="stable")]
