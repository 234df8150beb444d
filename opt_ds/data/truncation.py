"""Report of truncation by the model's limits, from the stores' indexes: one line for each limit that drops items."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from opt_ds.config import ModelConfig
from opt_ds.data.derived import cached_array
from opt_ds.data.lengths import stacked_length
from opt_ds.data.modality import Modality, modalities_of
from opt_ds.store.reader import FeatureStore

_BLOCK = 2**20


class _Dropped(NamedTuple):
    """Counts over the rows of one modality.

    They are all rows, truncated rows, the sum of the dropped fractions, and the longest row.
    """

    rows: float
    truncated: float
    dropped: float
    longest: float

    def line(self, key: str, value: int, rows: str, items: str, note: str = "") -> str:
        return (
            f"{key}={value}{note} truncates {self.truncated:,.0f} of {self.rows:,.0f} {rows} "
            f"({_percent(self.truncated / self.rows)}; on average {_percent(self.dropped / self.truncated)} of their {items} are "
            f"dropped): the longest needs {key}={self.longest:.0f}"
        )


def truncation_lines(model: ModelConfig, stores: list[FeatureStore]) -> list[str]:
    """Return one line for each limit of a modality that truncates samples of these stores.

    All rows of a store are counted, in every split. Time is linear in the number of rows and memory is constant. A
    store is counted once.
    """
    return list(_lines(model, stores))


def _lines(model: ModelConfig, stores: list[FeatureStore]) -> Iterator[str]:
    modalities = modalities_of(model)
    limits = [limit for modality in modalities for limit in modality.lengths_key]
    counts = [cached_array(store, "truncated", limits, partial(_count, modalities, store)) for store in stores]
    if not counts:
        return
    longest_of = np.max(counts, 0)[:, 3]
    for modality, sums, longest in zip(modalities, np.sum(counts, 0), longest_of, strict=True):
        dropped = _Dropped._make([*sums[:3], longest])
        if dropped.truncated:
            note = modality.limit_note([store.description.dims for store in stores])
            yield dropped.line(f"model.{modality.limit_key}", modality.limit, modality.row_word, modality.item_word, note)


def _count(modalities: Sequence[Modality], store: FeatureStore) -> np.ndarray:
    """Return the fields of _Dropped for each modality, float64 [M, 4]."""
    stored = [store.lengths(modality.name) for modality in modalities]
    return np.array(
        [_dropped(own, modality.limit, modality.stack) for own, modality in zip(stored, modalities, strict=True)]
    )


def _dropped(stored: np.ndarray, limit: int, stack: int) -> _Dropped:
    truncated = longest = 0
    dropped = 0.0
    for start in range(0, len(stored), _BLOCK):  # an index may be a memory map of 10^8 rows
        lengths = stacked_length(stored[start : start + _BLOCK], stack)
        longer = lengths[lengths > limit]
        truncated += len(longer)
        dropped += float((1 - limit / longer).sum())
        longest = max(longest, int(lengths.max(initial=0)))
    return _Dropped(len(stored), truncated, dropped, longest)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %" if fraction >= 0.001 else f"{100 * fraction:.2g} %"
