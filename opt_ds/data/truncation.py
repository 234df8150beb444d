"""Report of truncation by the model's limits, from the stores' indexes: one line for each limit that drops items."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from opt_ds.config import ModelConfig
from opt_ds.data.derived import cached_array
from opt_ds.data.lengths import stacked_length
from opt_ds.store.reader import FeatureStore

_BLOCK = 2**20


class _Dropped(NamedTuple):
    """Counts over the rows of one modality.

    They are all rows, truncated rows, the sum of the dropped fractions, and the longest row.
    """

    rows: float
    truncated: float
    lost: float
    longest: float

    def line(self, key: str, value: int, rows: str, items: str, note: str = "") -> str:
        return (
            f"{key}={value}{note} truncates {self.truncated:,.0f} of {self.rows:,.0f} {rows} "
            f"({_percent(self.truncated / self.rows)}; on average {_percent(self.lost / self.truncated)} of their {items} are "
            f"dropped): the longest needs {key}={self.longest:.0f}"
        )


def truncation_lines(model: ModelConfig, stores: list[FeatureStore]) -> list[str]:
    """Return one line for each of max_text_tokens, max_regions and max_frames that truncates samples of these stores.

    All rows of a store are counted, in every split. Time is linear in the number of rows and memory is constant. A
    store is counted once.
    """
    return list(_lines(model, stores))


def _lines(model: ModelConfig, stores: list[FeatureStore]) -> Iterator[str]:
    limits = [model.max_text_tokens, model.max_regions, model.max_frames, model.audio_stack]
    counts = [cached_array(store, "truncated", list(limits), partial(_count, model, store)) for store in stores]
    if not counts:
        return
    longest_of = np.max(counts, 0)[:, 3]
    totals = zip(np.sum(counts, 0), longest_of, strict=True)
    text, image, audio = (_Dropped._make([*sums[:3], longest]) for sums, longest in totals)
    if text.truncated:
        yield text.line("model.max_text_tokens", model.max_text_tokens, "texts", "tokens")
    if image.truncated:
        yield image.line("model.max_regions", model.max_regions, "images", "regions")
    if audio.truncated:
        rate_hz = min(store.description.dims.audio_frame_rate_hz for store in stores)
        heard = f" ({model.max_frames * model.audio_stack / rate_hz:.1f} s)" if rate_hz > 0 else ""
        yield audio.line("model.max_frames", model.max_frames, "recordings", "frames", heard)


def _count(model: ModelConfig, store: FeatureStore) -> np.ndarray:
    """Return the fields of _Dropped for texts, images and audio, float64 [3, 4]."""
    return np.array([
        _dropped(store.text_lengths, model.max_text_tokens, 1),
        _dropped(store.region_counts, model.max_regions, 1),
        _dropped(store.frame_counts, model.max_frames, model.audio_stack),
    ])  # fmt: skip


def _dropped(stored: np.ndarray, limit: int, stack: int) -> _Dropped:
    truncated = longest = 0
    lost = 0.0
    for start in range(0, len(stored), _BLOCK):  # an index may be a memory map of 10^8 rows
        lengths = stacked_length(stored[start : start + _BLOCK], stack)
        longer = lengths[lengths > limit]
        truncated += len(longer)
        lost += float((1 - limit / longer).sum())
        longest = max(longest, int(lengths.max(initial=0)))
    return _Dropped(len(stored), truncated, lost, longest)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.2g} %"
