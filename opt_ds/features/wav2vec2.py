"""wav2vec 2.0 (arXiv 2006.11477) frame features, from checkpoints in torchaudio's or Hugging Face's layout.

Shape letters: S samples of 16 kHz audio, T frames, C feature size.
"""

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from pydantic import Field, model_validator

from opt_ds.config.section import Section
from opt_ds.decoding.audio import SAMPLE_RATE_HZ
from opt_ds.errors import UserError
from opt_ds.features.extractors import load_state_dict, weights_fingerprint
from opt_ds.features.speech import SpeechExtractor, refuse_fairseq, windows
from opt_ds.weights import fit, read_config, read_folder

# The convolutions of every wav2vec 2.0 model: the receptive field of a frame is 400 samples, the hop is 320.
_RECEPTIVE, _HOP = 400, 320
# Weights of training or recognition heads, which checkpoints may have besides the encoder.
_HEADS = r"lm_head\..*|quantizer\..*|project_(q|hid)\..*|masked_spec_embed|classifier\..*|projector\..*"
# Fields of config.json that could select code or precision. They are ignored.
_NOT_OURS = ("_attn_implementation", "attn_implementation", "auto_map", "dtype", "torch_dtype", "quantization_config")


class Wav2Vec2Options(Section):
    """The options of wav2vec2."""

    weights: Path | None = Field(
        None, description="A Hugging Face folder, or a torchaudio state dict (base, large or large-lv60k)."
    )
    layer: int | None = Field(None, description="Transformer layer whose output is used, from 1. None: the last.")
    window_s: float = Field(30.0, description="Longest input of the network, in seconds.")
    overlap_s: float = Field(2.0, description="Overlap of adjacent windows, in seconds.")

    @model_validator(mode="after")
    def _windows_overlap_in_part(self) -> "Wav2Vec2Options":
        if not 0 <= 2 * self.overlap_s < self.window_s:
            raise ValueError(f"overlap_s {self.overlap_s:g}: must be less than half of window_s {self.window_s:g}")
        return self


class Wav2Vec2Extractor(SpeechExtractor):
    """Output of one Transformer layer, about 50 frames per second, without padding.

    The waveform is normalised as the checkpoint requires. Audio longer than `window_s` is split into overlapping
    windows. Each frame is taken from the window in which it is farthest from the edges. The number of frames is that of
    a single pass. Shorter audio yields exactly the features of the model.
    """

    name = "wav2vec2"
    options = Wav2Vec2Options
    frame_rate_hz = SAMPLE_RATE_HZ / _HOP

    def __init__(self, options: Wav2Vec2Options | None = None, device: str = "cpu") -> None:
        options = options or Wav2Vec2Options()
        weights = options.weights
        if weights is None:
            raise UserError("--speech wav2vec2: it needs a checkpoint: name its file or folder with --speech-weights")
        self._device = device
        self._hidden: Callable[[torch.Tensor], torch.Tensor]
        self._layer = options.layer
        self._window_s, self._overlap_s = options.window_s, options.overlap_s
        self._window = max(1, round(options.window_s * self.frame_rate_hz))
        self._margin = round(options.overlap_s * self.frame_rate_hz / 2)
        if weights.is_dir():
            self._load_hugging_face(weights)
        else:
            self._load_torchaudio(weights)
        self._weights_sha256 = weights_fingerprint(weights)

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint: everything that the features depend on."""
        return {
            "name": self.name,
            "layer": self._layer,
            "window_s": self._window_s,
            "overlap_s": self._overlap_s,
            "normalise": self._normalise,
            "package": self._package,
            "version": version(self._package),
            "weights_sha256": self._weights_sha256,
        }

    @torch.inference_mode()
    def extract(self, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        """Return float16 [T, C] per waveform. Audio shorter than one frame (25 ms) is padded to one frame."""
        return [None if waveform is None else self._frames(waveform) for waveform in inputs]

    def _frames(self, waveform: np.ndarray) -> np.ndarray:
        if self._normalise:
            waveform = (waveform - waveform.mean()) / np.sqrt(waveform.var() + self._epsilon)
        padded = np.pad(waveform, (0, max(0, _RECEPTIVE - len(waveform)))).astype("float32")
        count = (len(padded) - _RECEPTIVE) // _HOP + 1
        parts = []
        for first, last, start, stop in windows(count, self._window, self._margin):
            samples = torch.from_numpy(padded[first * _HOP : (last - 1) * _HOP + _RECEPTIVE] if count > self._window else padded)
            hidden_tc = self._hidden(samples.to(self._device)[None])[0]
            parts.append(hidden_tc[start - first : stop - first].to(torch.float16).cpu().numpy())
        return np.concatenate(parts)

    def _load_hugging_face(self, folder: Path) -> None:
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        config = read_config(folder, "wav2vec2", "wav2vec 2.0")
        state = read_folder(folder, "--speech-weights of wav2vec2")
        try:
            model = Wav2Vec2Model(Wav2Vec2Config(**{key: value for key, value in config.items() if key not in _NOT_OURS}))
        except Exception:  # transformers raises exceptions of many types for values that it cannot use
            raise UserError(f"{folder}: not a wav2vec 2.0 folder (its config.json cannot be used): fetch it again") from None
        own = model.state_dict()
        state = {_modern(key): value.float() if value.is_floating_point() else value for key, value in state.items()}
        # Some checkpoints lack the mask vector, which is used in training only.
        state.setdefault("masked_spec_embed", own.get("masked_spec_embed", torch.zeros(0)))
        fit(model, state, f"{folder}", "the wav2vec 2.0 of its config.json", _HEADS)
        self._normalise = _normalises(folder)
        model.eval().to(self._device)
        self._epsilon = 1e-7
        self._package = "transformers"
        self.dim = model.config.hidden_size
        layer = self._check_layer(model.config.num_hidden_layers)
        self._hidden = lambda waveforms: model(waveforms, output_hidden_states=True).hidden_states[layer]

    def _load_torchaudio(self, file: Path) -> None:
        refuse_fairseq(file)
        state = load_state_dict(file, "--speech-weights of wav2vec2")
        bias = state.get("encoder.feature_projection.projection.bias")
        width = 0 if bias is None else len(bias)
        # The lv60k models normalise the output of every convolution, the others only that of the first.
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
        fit(model, state, str(file), f"torchaudio's {builder}")
        model.eval().to(self._device)
        self._normalise = layer_norms
        self._epsilon = 1e-5  # torchaudio's bundles use layer_norm
        self._package = "torchaudio"
        self.dim = width
        layer = self._check_layer(len(model.encoder.transformer.layers))
        self._hidden = lambda waveforms: model.extract_features(waveforms, num_layers=layer)[0][-1]

    def _check_layer(self, count: int) -> int:
        layer = count if self._layer is None else self._layer
        if not 1 <= layer <= count:
            raise UserError(f"--speech-layer {layer}: the checkpoint has layers 1 to {count}")
        return layer


def _modern(key: str) -> str:
    """Return the current name of a weight.

    Models with a head have a prefix, and torch's weight norm had other names.
    """
    key = key.removeprefix("wav2vec2.")
    for old, new in (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1")):
        if key == f"encoder.pos_conv_embed.conv.{old}":
            return f"encoder.pos_conv_embed.conv.{new}"
    return key


def _normalises(folder: Path) -> bool:
    """Return whether the feature extractor of a Hugging Face folder normalises its input.

    The settings are in a file of their own, or part of the processor's.
    """
    own, processor = folder / "preprocessor_config.json", folder / "processor_config.json"
    file = own if own.is_file() else processor
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        settings = settings.get("feature_extractor") if file is processor and settings is not None else settings
        return settings is not None and bool(settings.get("do_normalize", True))
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{file}: not readable as a feature extractor's settings: fetch it again") from None
