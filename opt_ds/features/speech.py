"""The base class of all speech feature extractors, and what several of them do: windows, averages of frames, refused files.

Shape letters: S samples of 16 kHz audio, T frames, C feature size.
"""

import zipfile
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.features.extractors import Extractor

# Words in the pickle of a checkpoint that was saved by Fairseq, or by code derived from it (WavLM's first release).
_FAIRSEQ = (b"fairseq", b"optimizer_history", b"encoder_layerdrop", b"conv_feature_layers")
_SEARCHED = 4 * 2**20  # bytes


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


def windows(count: int, window: int, margin: int) -> list[tuple[int, int, int, int]]:
    """Split `count` frames into windows.

    Return per window (first, last + 1) of the computed frames and (start, stop) of the frames that are kept.
    """
    if count <= window:
        return [(0, count, 0, count)]
    step = window - 2 * margin
    return [
        (max(0, start - margin), min(count, start + step + margin), start, min(count, start + step))
        for start in range(0, count, max(1, step))
    ]


def refuse_fairseq(file: Path) -> None:
    """Raise UserError for a checkpoint of Fairseq, whose weights have other names. Other files pass, also missing ones."""
    if not file.is_file():
        return
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            start = archive.open(pickles[0]).read(_SEARCHED) if pickles else b""
    else:
        with open(file, "rb") as stream:
            start = stream.read(_SEARCHED)
        start = start if start[:1] == b"\x80" else b""  # a pickle
    if any(word in start for word in _FAIRSEQ):
        raise UserError(
            f"{file}: a checkpoint of Fairseq: convert it to a Hugging Face folder with transformers 4's "
            "convert_<model>_original_pytorch_checkpoint_to_pytorch.py (wav2vec2, hubert, wavlm or data2vec_audio) and name that"
        )
