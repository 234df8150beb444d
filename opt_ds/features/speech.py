"""Recordings -> frame features: `logmel` (80 bins, 100 Hz); `wav2vec2`: see wav2vec2.py.

Shapes: S samples of 16 kHz audio, T frames, C feature size.
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
    """An extractor (see extractors.py) of frames float16 [T, C], `frame_rate_hz` a second, from mono 16 kHz audio."""

    name: str
    dim: int
    frame_rate_hz: float

    def identity(self) -> dict[str, Any]: ...

    def extract(self, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray | None]: ...


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
    """Build an extractor by name. Raises UserError for an unknown name, or missing or unfit weights, or no such layer."""
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
    """Return float16 [ceil(T / size), C]: means of `size` frames each, the last of what is left."""
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
        """Return what the features depend on."""
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
        # Reflection at the edges needs more samples than half a window.
        padded = np.pad(waveform, (0, max(0, 512 - len(waveform))))
        mel_ct = self._mel(torch.from_numpy(padded))
        return mel_ct.clamp_min(self._floor).log().T.to(torch.float16).numpy()
