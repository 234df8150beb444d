"""Recordings -> frame features: `logmel` (80 bins, 100 Hz) and `wav2vec2` (torchaudio or Hugging Face checkpoints).

Shapes: S samples of 16 kHz audio, T frames, C feature size.
"""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import torch
import torchaudio

from opt_ds.errors import UserError, did_you_mean
from opt_ds.prepare.extractors import load_state_dict, weights_identity

SAMPLE_RATE_HZ = 16_000


class SpeechExtractor(Protocol):
    """An extractor (see extractors.py) of frames float16 [T, C], `frame_rate_hz` a second, from mono 16 kHz audio."""

    name: str
    dim: int
    frame_rate_hz: float

    def identity(self) -> dict[str, Any]: ...

    def extract(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]: ...


SPEECH_EXTRACTORS = ("logmel", "wav2vec2")


def build_speech_extractor(name: str, *, weights: Path | None = None, device: str = "cpu") -> SpeechExtractor:
    """Build an extractor by name. Raises UserError for an unknown name, or missing or unfit weights."""
    if name == "logmel":
        if weights is not None:
            raise UserError("--speech-weights: logmel has no weights: leave it out, or choose --speech wav2vec2")
        return LogMelExtractor()
    if name == "wav2vec2":
        return Wav2Vec2Extractor(weights, device=device)
    raise UserError(
        f'--speech "{name}": unknown extractor{did_you_mean(name, SPEECH_EXTRACTORS)}: '
        f"choose {' or '.join(SPEECH_EXTRACTORS)}"
    )


def load_recording(path: Path) -> np.ndarray:
    """Return a WAV, FLAC, OGG or MP3 file of any rate as mono float32 [S] at 16 kHz.

    Raises soundfile's error for a broken file, ValueError for one without samples or with NaN.
    """
    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(1)
    if not len(mono):
        raise ValueError("the recording has no samples")
    if not np.isfinite(mono).all():
        raise ValueError("the recording has NaN or infinite samples")
    if rate_hz != SAMPLE_RATE_HZ:
        mono = torchaudio.functional.resample(torch.from_numpy(mono), rate_hz, SAMPLE_RATE_HZ).numpy()
    return mono


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
    def extract(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return float16 [1 + S // 160, 80] per waveform."""
        frames = []
        for waveform in inputs:
            # Reflection at the edges needs more samples than half a window.
            padded = np.pad(waveform, (0, max(0, 512 - len(waveform))))
            mel_ct = self._mel(torch.from_numpy(padded))
            frames.append(mel_ct.clamp_min(self._floor).log().T.to(torch.float16).numpy())
        return frames


class Wav2Vec2Extractor:
    """Last hidden layer of wav2vec 2.0 (arXiv 2006.11477), about 50 frames a second; one recording at a time, unpadded.

    `weights`: a Hugging Face folder, or a torchaudio state dict file (base, large or large-lv60k).
    """

    name = "wav2vec2"
    frame_rate_hz = 50.0

    def __init__(self, weights: Path | None, *, device: str = "cpu") -> None:
        if weights is None:
            raise UserError("--speech wav2vec2: it needs a checkpoint: name its file or folder with --speech-weights")
        self._device = device
        if weights.is_dir():
            self._load_hugging_face(weights)
        else:
            self._load_torchaudio(weights)
        self._weights_sha256 = weights_identity(weights)

    def identity(self) -> dict[str, Any]:
        """Return what the features depend on."""
        return {
            "name": self.name,
            "normalise": self._normalise,
            "package": self._package,
            "version": version(self._package),
            "weights_sha256": self._weights_sha256,
        }

    @torch.inference_mode()
    def extract(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return float16 [T, C] per waveform; a recording shorter than one frame (25 ms) is padded to one."""
        frames = []
        for waveform in inputs:
            if self._normalise:
                waveform = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
            padded = np.pad(waveform, (0, max(0, 400 - len(waveform)))).astype("float32")
            hidden_tc = self._hidden(torch.from_numpy(padded).to(self._device)[None])[0]
            frames.append(hidden_tc.to(torch.float16).cpu().numpy())
        return frames

    def _load_hugging_face(self, folder: Path) -> None:
        from transformers import Wav2Vec2Model

        try:
            model = Wav2Vec2Model.from_pretrained(folder, local_files_only=True).eval().to(self._device)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: not a wav2vec 2.0 folder ({str(error).splitlines()[0]})") from None
        settings = folder / "preprocessor_config.json"
        self._normalise = settings.is_file() and bool(json.loads(settings.read_text()).get("do_normalize", True))
        self._package = "transformers"
        self.dim = model.config.hidden_size
        self._hidden = lambda waveforms: model(waveforms).last_hidden_state

    def _load_torchaudio(self, file: Path) -> None:
        state = load_state_dict(file, "--speech-weights of wav2vec2")
        bias = state.get("encoder.feature_projection.projection.bias")
        width = 0 if bias is None else len(bias)
        # The lv60k models normalise every convolution's output, the others only the first one's.
        layer_norms = "feature_extractor.conv_layers.1.layer_norm.weight" in state
        builders = {
            (768, False): "wav2vec2_base",
            (1024, False): "wav2vec2_large",
            (1024, True): "wav2vec2_large_lv60k",
        }
        builder = builders.get((width, layer_norms))
        if builder is None:
            raise UserError(f"{file}: not a torchaudio wav2vec 2.0 base, large or large-lv60k state dict")
        aux = state.get("aux.bias")
        model = getattr(torchaudio.models, builder)(aux_num_out=None if aux is None else len(aux))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"{file}: does not fit torchaudio's {builder} ({str(error).splitlines()[-1].strip()})"
            ) from None
        model.eval().to(self._device)
        self._normalise = layer_norms
        self._package = "torchaudio"
        self.dim = width
        self._hidden = lambda waveforms: model.extract_features(waveforms)[0][-1]
