"""Donors of the sample-level task: another sample of the same split and another group gives one of its modalities."""

from collections.abc import Iterator

import numpy as np

from opt_ds.data.keyed import keyed_choice
from opt_ds.store.reader import FeatureStore

_TRIES = 16
_BLOCK = 65_536


class DonorPool:
    """The samples of one split that can give a text, an image or an audio to another sample of it."""

    def __init__(self, store: FeatureStore, samples: np.ndarray) -> None:
        """`samples`: int64 indices of the split's samples."""
        self._rows, self._groups = store.rows, store.groups
        self._givers = [self._with(store, samples, modality) for modality in range(3)]
        several_modalities = any(((self._rows[part] >= 0).sum(1) >= 2).any() for part in _blocks(samples))
        # "none" wants two donors of two groups besides the sample's own
        self.usable = several_modalities and all(not len(givers) or self._has_three_groups(givers) for givers in self._givers)

    def _with(self, store: FeatureStore, samples: np.ndarray, modality: int) -> np.ndarray:
        """The samples that have the modality; where all have it the very array, which may be a map of 10^8 samples."""
        if store.all_have(modality):
            return samples
        return np.concatenate([samples[:0], *(block[self._rows[block, modality] >= 0] for block in _blocks(samples))])

    def _has_three_groups(self, givers: np.ndarray) -> bool:
        found: set[int] = set()
        for block in _blocks(givers):
            found.update(np.unique(self._groups[block])[:3].tolist())
            if len(found) >= 3:
                return True
        return False

    def replace(self, rows: np.ndarray, replaced: np.ndarray, sample: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Rows [B, 3] with the replaced ones taken from donors; no two of a sample's sources share a group or a row."""
        rows = rows.copy()
        used = [self._groups[sample]]
        for modality in range(3):
            who = np.flatnonzero(replaced[:, modality] & (rows[:, modality] >= 0))
            group = self._groups[sample].copy()
            if who.size:
                donor = self._donors(modality, who, used, rows[who, modality], key[who])
                rows[who, modality] = self._rows[donor, modality]
                group[who] = self._groups[donor]
            used.append(group)
        return rows

    def _donors(
        self, modality: int, who: np.ndarray, used: list[np.ndarray], own_row: np.ndarray, key: np.ndarray
    ) -> np.ndarray:
        givers = self._givers[modality]
        donor = np.empty(len(who), dtype=np.int64)
        waiting = np.arange(len(who))
        place = np.zeros(len(who), dtype=np.int64)
        for attempt in range(_TRIES):
            place[waiting] = keyed_choice(len(givers), key[waiting], "donor", modality, attempt)
            waiting = self._refused(givers, place, waiting, modality, who, used, own_row, donor)
        for _ in range(len(givers)):  # a split of few groups: walk on to the next sample that will do
            if not waiting.size:
                break
            place[waiting] = (place[waiting] + 1) % len(givers)
            waiting = self._refused(givers, place, waiting, modality, who, used, own_row, donor)
        assert not waiting.size, "a pool with three groups always has a donor"
        return donor

    def _refused(
        self,
        givers: np.ndarray,
        place: np.ndarray,
        waiting: np.ndarray,
        modality: int,
        who: np.ndarray,
        used: list[np.ndarray],
        own_row: np.ndarray,
        donor: np.ndarray,
    ) -> np.ndarray:
        """Try the waiting places; keep those whose group is new to the sample, give back those that still wait."""
        candidate = givers[place[waiting]]
        good = self._rows[candidate, modality] != own_row[waiting]
        for groups in used:
            good &= self._groups[candidate] != groups[who[waiting]]
        donor[waiting] = candidate
        return waiting[~good]


def _blocks(samples: np.ndarray) -> Iterator[np.ndarray]:
    return (samples[start : start + _BLOCK] for start in range(0, len(samples), _BLOCK))
