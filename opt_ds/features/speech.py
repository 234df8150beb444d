"""The base class of all speech feature extractors, and the averaging of frames.

Shape letters: S samples of 16 kHz audio, T frames, C feature size.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from opt_ds.features.extractors import Extractor


class SpeechExtractor(Extractor):
    """An extractor of frames, float16 [T, C], from mono 16 kHz audio, or from files that have them (`reads_files`)."""

    kind = "audio"
    files_per_call = 32
    #: Size of a frame.
    dim: int
    #: Frames per second.
    frame_rate_hz: float

    @abstractmethod
    def extract(self, inputs: Sequence[Any]) -> list[np.ndarray | None]:
        """Return the frames of each waveform, float32 [S], or of each file's path; None for None."""


def pool_frames(frames_tc: np.ndarray, size: int) -> np.ndarray:
    """Average groups of `size` frames; return float16 [ceil(T / size), C]. The last group may be smaller."""
    if size == 1:
        return frames_tc
    starts = np.arange(0, len(frames_tc), size)
    counts = np.diff(np.append(starts, len(frames_tc)))[:, None]
    return (np.add.reduceat(frames_tc.astype("float32"), starts) / counts).astype("float16")
