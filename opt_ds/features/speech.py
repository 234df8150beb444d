"""Speech frame features: `logmel` (80 bins, 100 Hz) and `wav2vec2` (see wav2vec2.py).

Shape letters: S samples of 16 kHz audio, T frames, C feature size.
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torchaudio

from opt_ds.decoding.recordings import SAMPLE_RATE_HZ
from opt_ds.errors import UserError, did_you_mean


class SpeechExtractor(Protocol):
    """An extractor (see extractors.py) of audio frames.

    It converts mono 16 kHz audio to frames, float16 [T, C], at `frame_rate_hz`.
    """

    name: str
    dim: int
    frame_rate_hz: float

    def identity(self) -> dict[str, Any]:
        """Return the fingerprint: everything that the features depend on."""
        ...

    def extract(self, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        """Return the frames of each waveform [S]; None for None."""
        ...


SPEECH_EXTRACTORS = ("logmel", "wav2vec2")


def build_speech_extractor(
    name: str,
    *,
    weights: Path | None = None,
    layer: int | None = None,
    window_s: float = 30.0,
    overlap_s: float = 2.0,
    device: str = "cpu",
) -> SpeechExtractor:
    """Build an extractor by name.

    Args:
        name: One of SPEECH_EXTRACTORS.
        weights: Checkpoint file or folder; wav2vec2 only.
        layer: Transformer layer whose output is used, from 1; wav2vec2 only. None: the last.
        window_s: Longest input of the network in seconds; wav2vec2 only.
        overlap_s: Overlap of adjacent windows in seconds; wav2vec2 only.
        device: Device that the network runs on.

    Raises:
        UserError: The name is unknown, the weights are missing or do not fit, or there is no such layer.
    """
    if name == "logmel":
        for option, value in (("--speech-weights", weights), ("--speech-layer", layer)):
            if value is not None:
                raise UserError(f"{option}: logmel has no weights: leave it out, or choose --speech wav2vec2")
        return LogMelExtractor()
    if name == "wav2vec2":
        from opt_ds.features.wav2vec2 import Wav2Vec2Extractor

        return Wav2Vec2Extractor(weights, layer=layer, window_s=window_s, overlap_s=overlap_s, device=device)
    raise UserError(
        f'--speech "{name}": unknown extractor{did_you_mean(name, SPEECH_EXTRACTORS)}: '
        f"choose {' or '.join(SPEECH_EXTRACTORS)}"
    )


def pool_frames(frames_tc: np.ndarray, size: int) -> np.ndarray:
    """Average groups of `size` frames; return float16 [ceil(T / size), C]. The last group may be smaller."""
    if size == 1:
        return frames_tc
    starts = np.arange(0, len(frames_tc), size)
    counts = np.diff(np.append(starts, len(frames_tc)))[:, None]
    return (np.add.reduceat(frames_tc.astype("float32"), starts) / counts).astype("float16")


class LogMelExtractor:
    """Natural logarithm of 80 mel energies: 25 ms window, 10 ms hop, frames centred on multiples of the hop."""

    name = "logmel"
    dim = 80
    frame_rate_hz = 100.0
    _floor = 1e-5  # just above the quantisation noise of 16-bit audio

    def __init__(self) -> None:
        self._mel = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE_HZ, n_fft=512, win_length=400, hop_length=160, n_mels=self.dim
        )

    def identity(self) -> dict[str, Any]:
        """Return the fingerprint: everything that the features depend on."""
        return {
            "name": self.name,
            "bins": self.dim,
            "window_ms": 25,
            "hop_ms": 10,
            "floor": self._floor,
            "package": "torchaudio",
            "version": version("torchaudio"),
            "weights_sha256": None,
        }

    @torch.inference_mode()
    def extract(self, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        """Return float16 [1 + S // 160, 80] per waveform."""
        return [None if waveform is None else self._frames(waveform) for waveform in inputs]

    def _frames(self, waveform: np.ndarray) -> np.ndarray:
        # Reflection padding at the edges requires more samples than half a window.
        padded = np.pad(waveform, (0, max(0, 512 - len(waveform))))
        mel_ct = self._mel(torch.from_numpy(padded))
        return mel_ct.clamp_min(self._floor).log().T.to(torch.float16).numpy()
