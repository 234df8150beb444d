"""What the model's limits drop of the stores' items: counted over the stores' indexes, one line for each limit that drops any."""

from collections.abc import Iterator

import numpy as np

from opt_ds.config import ModelConfig
from opt_ds.data.lengths import stacked_length
from opt_ds.store.reader import FeatureStore

_BLOCK = 2**20


class _Dropped:
    """Counts over the rows of one modality: all of them, the truncated ones, the share that they lose, the longest."""

    def __init__(self) -> None:
        self.rows = self.truncated = self.longest = 0
        self._lost = 0.0

    def add(self, stored: np.ndarray, limit: int, stack: int) -> None:
        for start in range(0, len(stored), _BLOCK):  # an index may be a map of 10^8 rows
            lengths = stacked_length(stored[start : start + _BLOCK], stack)
            longer = lengths[lengths > limit]
            self.rows += len(lengths)
            self.truncated += len(longer)
            self._lost += float((1 - limit / longer).sum())
            self.longest = max(self.longest, int(lengths.max(initial=0)))

    def line(self, key: str, value: int, rows: str, items: str, note: str = "") -> str:
        return (
            f"{key}={value}{note} truncates {self.truncated:,} of {self.rows:,} {rows} ({_percent(self.truncated / self.rows)}; on "
            f"average {_percent(self._lost / self.truncated)} of their {items} are dropped): the longest needs {key}={self.longest}"
        )


def truncation_lines(model: ModelConfig, stores: list[FeatureStore]) -> list[str]:
    """Return a line for each of max_text_tokens, max_regions and max_frames that truncates samples of these stores.

    All rows of a store are counted, whatever their split. Time is linear in the number of rows, memory is constant.
    """
    return list(_lines(model, stores))


def _lines(model: ModelConfig, stores: list[FeatureStore]) -> Iterator[str]:
    text, image, audio = _Dropped(), _Dropped(), _Dropped()
    for store in stores:
        text.add(store.text_lengths, model.max_text_tokens, 1)
        image.add(store.region_counts, model.max_regions, 1)
        audio.add(store.frame_counts, model.max_frames, model.audio_stack)
    if text.truncated:
        yield text.line("model.max_text_tokens", model.max_text_tokens, "texts", "tokens")
    if image.truncated:
        yield image.line("model.max_regions", model.max_regions, "images", "regions")
    if audio.truncated:
        rate_hz = min(store.description.dims.audio_frame_rate_hz for store in stores)
        heard = f" ({model.max_frames * model.audio_stack / rate_hz:.1f} s)" if rate_hz > 0 else ""
        yield audio.line("model.max_frames", model.max_frames, "recordings", "frames", heard)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.2g} %"
