"""Audio: how many frames are masked, and in which spans."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ds.data.masking import num_masked
from opt_ds.data.modalities import AUDIO
from opt_ds.modalities.audio import Audio, AudioItems
from tests.data.test_masking import KEYS, runs
from tests.tiny import make_config

UNIT = Audio(make_config().model, AUDIO)


@given(length=st.integers(0, 600), probability=st.floats(0.01, 0.99))
def test_one_frame_stays(length: int, probability: float) -> None:
    expected = min(int(num_masked(length, probability)), max(length - 1, 0))
    assert UNIT.count_masked(np.array([length]), probability)[0] == expected


def test_the_count_at_15_percent() -> None:
    lengths = np.array([0, 1, 2, 6, 7, 10, 20, 33, 100])
    assert UNIT.count_masked(lengths, 0.15).tolist() == [0, 0, 1, 1, 1, 2, 3, 5, 15]


@given(length=st.integers(1, 120), probability=st.floats(0.01, 0.99), span=st.integers(1, 12), key=KEYS)
@settings(max_examples=200)
def test_masked_frames_come_in_spans(length: int, probability: float, span: int, key: int) -> None:
    items = AudioItems(np.zeros((length, 12), np.float16))
    UNIT.mask(items, None, probability, span, key)  # type: ignore[arg-type]  # it reads nothing of the store
    masked = items.is_masked
    assert masked.shape == (length,) and masked.sum() == UNIT.count_masked(length, probability)
    assert not masked.all(), "at least one frame stays"
    assert (runs(masked) < span).sum() <= 1, "only the remainder is shorter than the span"
