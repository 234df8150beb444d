"""Log-mel energies of audio: 80 bins, 100 frames per second.

Shape letters: S samples of 16 kHz audio.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torchaudio

from opt_ds.config.section import Section
from opt_ds.decoding.audio import SAMPLE_RATE_HZ
from opt_ds.features.speech import SpeechExtractor


class LogMelExtractor(SpeechExtractor):
    """Natural logarithm of 80 mel energies: 25 ms window, 10 ms hop, frames centred on multiples of the hop."""

    name = "logmel"
    dim = 80
    frame_rate_hz = 100.0
    _floor = 1e-5  # just above the quantisation noise of 16-bit audio

    def __init__(self, options: Section | None = None, device: str = "cpu") -> None:
        self._mel = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE_HZ, n_fft=512, win_length=400, hop_length=160, n_mels=self.dim
        )

    def fingerprint(self) -> dict[str, Any]:
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
