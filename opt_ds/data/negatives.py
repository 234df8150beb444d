"""Negative sampler of the sample-level task.

Modalities are replaced by those of other samples of the same split and another group.

A fraction of the negatives may be hard negatives: of several sampled negatives, the one whose text is most similar to
the sample's own.

Legend: B samples; M modalities of the model, of which the three built-in ones are replaced.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain

import numpy as np

from opt_ds.data.derived import cached_array
from opt_ds.data.modalities import MODALITIES
from opt_ds.data.text_similarity import TextSimilarity
from opt_ds.ops.keyed import keyed_choice, keyed_hash, keyed_uniform
from opt_ds.store.reader import FeatureStore

_TRIES = 16
_BLOCK = 65_536


class NegativeSampler:
    """Samples of one split whose text, image or audio can replace that of another sample."""

    def __init__(
        self,
        store: FeatureStore,
        samples: np.ndarray,
        split: str | None = None,
        hard_fraction: float = 0.0,
        hard_candidates: int = 1,
    ) -> None:
        """Find the candidate negatives of each modality.

        Args:
            store: The store.
            samples: int64 indices of the split's samples.
            split: Name of the split if `samples` are all of its samples; derived arrays are then cached (see
                `data.derived`). None: some of its samples.
            hard_fraction: Fraction of the negatives that are hard negatives.
            hard_candidates: Number of candidates sampled for each hard negative.
        """
        self._rows, self._groups = store.rows, store.groups
        self._providers = [self._with(store, samples, modality, split) for modality in MODALITIES]
        several_modalities = any(
            ((self._rows[part][:, : len(MODALITIES)] >= 0).sum(1) >= 2).any() for part in _blocks(samples)
        )
        # The label "none" needs negatives from two groups other than the sample's own.
        self.usable = several_modalities and all(
            not len(providers) or self._suffices(providers, modality) for modality, providers in enumerate(self._providers)
        )
        self._run_ends: dict[int, np.ndarray] = {}
        self._hard_fraction, self._candidates, self._similarity = 0.0, 1, None
        if hard_fraction and self.usable:
            self._hard_fraction, self._candidates = hard_fraction, hard_candidates
            assert split is not None, "hard negatives are sampled from a complete split"
            self._similarity = TextSimilarity(store, samples, [split])

    def _with(self, store: FeatureStore, samples: np.ndarray, modality: int, split: str | None) -> np.ndarray:
        """Return the samples that have the modality.

        If all have it, return `samples` itself, which may be a memory map of 10^8 entries.
        """
        if store.all_have(modality):
            return samples

        def find() -> np.ndarray:
            return np.concatenate([samples[:0], *(block[self._rows[block, modality] >= 0] for block in _blocks(samples))])

        return find() if split is None else cached_array(store, "with", [split, modality], find)

    def _suffices(self, providers: np.ndarray, modality: int) -> bool:
        """Return whether each candidate has negatives in two groups other than its own.

        The rows of the negatives must differ from the candidate's own row.
        """
        rows_of: dict[int, set[int]] = {}
        apart: dict[int, int] = {}  # row -> group; each row and each group occurs at most once
        for block in chain((providers[:256],), _blocks(providers)):  # the first few candidates are usually enough
            pairs = np.unique(np.stack([self._groups[block], self._rows[block, modality]], axis=1), axis=0)
            for group, row in pairs.tolist():
                if group not in rows_of and row not in apart:
                    apart[row] = group
                if len(apart) > 3:  # one may be of the candidate's own group and one of its own row, so two are left
                    return True
                rows_of.setdefault(group, set()).add(row)
        only: Counter[int] = Counter(next(iter(rows)) for rows in rows_of.values() if len(rows) == 1)
        # Groups whose only row is the candidate's own row are no negatives, and neither is its own group.
        return all(len(rows_of) - only[row] - (len(rows) > 1) >= 2 for rows in rows_of.values() for row in rows)

    def replace(self, rows: np.ndarray, replaced: np.ndarray, sample: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Return rows [B, M] in which the entries marked by `replaced` come from negatives.

        No two sources of a sample have the same group or the same row.

        Args:
            rows: int64 [B, M], rows of the samples; -1: absent.
            replaced: bool [B, 3], the modalities to replace.
            sample: int64 [B], sample indices.
            key: uint64 [B], keys of the random choices.

        Returns:
            int64 [B, M].
        """
        rows = rows.copy()
        used = [self._groups[sample]]
        for modality in MODALITIES:
            who = np.flatnonzero(replaced[:, modality] & (rows[:, modality] >= 0))
            group = self._groups[sample].copy()
            if who.size:
                negative = self._negatives(modality, who, used, rows[who, modality], key[who])
                near = keyed_uniform(key[who], "near donor", modality) < self._hard_fraction
                if near.any():
                    negative[near] = self._nearest(modality, who[near], used, rows[who[near], modality], key[who[near]], sample)
                rows[who, modality] = self._rows[negative, modality]
                group[who] = self._groups[negative]
            used.append(group)
        return rows

    def _nearest(
        self, modality: int, who: np.ndarray, used: list[np.ndarray], own_row: np.ndarray, key: np.ndarray, sample: np.ndarray
    ) -> np.ndarray:
        """Return, of several uniformly sampled negatives, the one with the most similar text.

        A negative with the same content as the sample is chosen only if there is no other.
        """
        assert self._similarity is not None
        number = np.tile(np.arange(self._candidates), len(who))
        several = keyed_hash(np.repeat(key, self._candidates), "candidate", number)
        sampled = self._negatives(
            modality, np.repeat(who, self._candidates), used, np.repeat(own_row, self._candidates), several
        )
        candidate = sampled.reshape(len(who), self._candidates)
        near = self._similarity.of(sample[who], candidate)
        near[self._similarity.same_content(sample[who], candidate)] = -np.inf
        return np.take_along_axis(candidate, near.argmax(1)[:, None], axis=1)[:, 0]

    def _negatives(
        self, modality: int, who: np.ndarray, used: list[np.ndarray], own_row: np.ndarray, key: np.ndarray
    ) -> np.ndarray:
        providers = self._providers[modality]
        negative = np.empty(len(who), dtype=np.int64)
        waiting = np.arange(len(who))
        place = np.zeros(len(who), dtype=np.int64)
        for attempt in range(_TRIES):
            if not waiting.size:
                break
            place[waiting] = keyed_choice(len(providers), key[waiting], "donor", modality, attempt)
            waiting = self._refused(providers, place, waiting, modality, who, used, own_row, negative)
        for _ in range(len(providers)):  # in a split with few groups, continue with the next sample that qualifies
            if not waiting.size:
                break
            place[waiting] = self._next_place(place[waiting], modality, [groups[who[waiting]] for groups in used])
            waiting = self._refused(providers, place, waiting, modality, who, used, own_row, negative)
        assert not waiting.size, "a pool with three groups always has a negative"
        return negative

    def _next_place(self, place: np.ndarray, modality: int, used: list[np.ndarray]) -> np.ndarray:
        """Return the next index to try.

        If an index failed because of its group, skip the neighbours of the same group.
        """
        providers = self._providers[modality]
        if modality not in self._run_ends:
            self._run_ends[modality] = self._ends_of_runs(providers)
        ends, groups = self._run_ends[modality], self._groups[providers[place]]
        of_used_group = np.any([groups == each for each in used], axis=0)
        return np.where(of_used_group, ends[np.searchsorted(ends, place, side="right")], place + 1) % len(providers)

    def _ends_of_runs(self, providers: np.ndarray) -> np.ndarray:
        """Return the ends of runs of neighbours of one group, ascending; the last one is len(providers)."""
        ends: list[np.ndarray] = []
        start, last = 0, None
        for block in _blocks(providers):
            groups = self._groups[block]
            if last is not None and groups[0] != last:
                ends.append(np.array([start]))
            ends.append(start + 1 + np.flatnonzero(groups[1:] != groups[:-1]))
            start, last = start + len(block), groups[-1]
        return np.concatenate([*ends, [start]])

    def _refused(
        self,
        providers: np.ndarray,
        place: np.ndarray,
        waiting: np.ndarray,
        modality: int,
        who: np.ndarray,
        used: list[np.ndarray],
        own_row: np.ndarray,
        negative: np.ndarray,
    ) -> np.ndarray:
        """Try the candidates of the waiting samples and store them.

        Args:
            providers: Samples that have the modality.
            place: Index into `providers` per sample of `who`.
            waiting: Indices into `who` of the samples without a negative.
            modality: The modality that is replaced.
            who: Indices of the samples.
            used: Groups that the negatives may not have, one array per source.
            own_row: The samples' own rows.
            negative: The negatives, which are set.

        Returns:
            The waiting samples whose candidate is not allowed.
        """
        candidate = providers[place[waiting]]
        good = self._rows[candidate, modality] != own_row[waiting]
        own_group = self._groups[candidate]
        for groups in used:
            good &= own_group != groups[who[waiting]]
        negative[waiting] = candidate
        return waiting[~good]


def _blocks(samples: np.ndarray) -> Iterator[np.ndarray]:
    return (samples[start : start + _BLOCK] for start in range(0, len(samples), _BLOCK))
