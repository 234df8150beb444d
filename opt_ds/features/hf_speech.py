"""Frames of a speech encoder of transformers: wav2vec 2.0, HuBERT, WavLM, data2vec, wav2vec2-BERT and Whisper's encoder.

Shape letters: S samples of 16 kHz audio, T frames, C feature size.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator

from opt_ds.config.section import Section
from opt_ds.decoding.audio import SAMPLE_RATE_HZ
from opt_ds.errors import UserError
from opt_ds.features.extractors import layer_number, weights_fingerprint
from opt_ds.features.hugging_face import build_config, build_processor, load_model, model_class, read_fields, read_processor
from opt_ds.features.speech import SpeechExtractor, refuse_fairseq, windows
from opt_ds.weights import Tensors, read_folder, without

_WHAT = "--speech-weights of hf_speech"
#: model_type -> class of transformers.
MODELS = {
    "wav2vec2": "Wav2Vec2Model",
    "hubert": "HubertModel",
    "wavlm": "WavLMModel",
    "data2vec-audio": "Data2VecAudioModel",
    "wav2vec2-bert": "Wav2Vec2BertModel",
    "whisper": "WhisperEncoder",
}
# Weights of training or recognition heads, which folders may have besides the encoder.
_HEADS = r"lm_head\..*|quantizer\..*|project_(q|hid)\..*|classifier\..*|projector\..*|layer_weights"
_DECODER = r"(model\.)?decoder\..*|proj_out\.weight|classifier\..*|projector\..*|layer_weights"
#: Used in training only.
_MASK = r"masked_spec_embed"


class HFSpeechOptions(Section):
    """The options of hf_speech."""

    weights: Path | None = Field(
        None, description=f"A Hugging Face folder of one of {', '.join(MODELS)} (its model_type), also with a head on top."
    )
    backbone: str | None = Field(
        None, description="Architecture that the folder must have, by its model_type. None: that of its config.json."
    )
    layer: int | None = Field(
        None,
        description="Layer whose output is used, from 1, or from -1 for the last. None: the output of the encoder, after its "
        "final norm if it has one.",
    )
    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="Layers whose outputs are averaged, such as [9, 10, 11, 12]. None: `layer` alone."
    )
    normalise: bool | None = Field(
        None,
        description="Whether the waveform is scaled to mean 0 and variance 1. None: as preprocessor_config.json says. "
        "wav2vec2-bert and whisper have spectrograms of their own instead.",
    )
    window_s: float = Field(30.0, gt=0, description="Longest input of the network, in seconds. Whisper's is 30 at most.")
    overlap_s: float = Field(2.0, description="Overlap of adjacent windows, in seconds.")

    @model_validator(mode="after")
    def _consistent(self) -> "HFSpeechOptions":
        if not 0 <= 2 * self.overlap_s < self.window_s:
            raise ValueError(f"overlap_s {self.overlap_s:g}: must be less than half of window_s {self.window_s:g}")
        if self.layer is not None and self.layers is not None:
            raise ValueError("layer and layers: give one of them")
        return self


class HFSpeechExtractor(SpeechExtractor):
    """Output of one layer of a speech encoder, or the mean of several, about 50 frames per second, without padding.

    The audio is prepared as the model's own preprocessor_config.json says. Audio longer than `window_s` is split into
    overlapping windows, and each frame is taken from the window in which it is farthest from the edges. The network runs in fp32.
    """

    name = "hf_speech"
    options = HFSpeechOptions

    def __init__(self, options: HFSpeechOptions | None = None, device: str = "cpu") -> None:
        options = options or HFSpeechOptions()
        folder = options.weights
        if folder is None:
            raise UserError("--speech hf_speech: it needs a model: name its folder with --speech-weights")
        fields, self._backbone = _fields(folder, options.backbone)
        self._options, self._device = options, device
        self._weights_sha256 = weights_fingerprint(folder)
        config = build_config(folder, fields, self._backbone)
        self._model = _load(folder, config, self._backbone).to(device)
        self._input = _INPUTS.get(self._backbone, _Waveform)(folder, config, options)
        self._layers = self._chosen_layers(config)
        self.dim = int(config.hidden_size)
        self.frame_rate_hz = SAMPLE_RATE_HZ / self._input.hop
        self._window, self._margin = self._windows(folder)

    def _chosen_layers(self, config: Any) -> tuple[int, ...]:
        """Return the layers to average, from 1; none for the output of the encoder."""
        given = self._options.layers or ((self._options.layer,) if self._options.layer is not None else ())
        option = "--speech-layer" if self._options.layers is None else "audio.layers"
        count = int(getattr(config, "encoder_layers", None) or config.num_hidden_layers)
        return tuple(number for layer in given if (number := layer_number(layer, count, option)) is not None)

    def _windows(self, folder: Path) -> tuple[int, int]:
        """Return the length of a window and of its margin at each end, in frames."""
        longest = self._input.longest or self._options.window_s * self.frame_rate_hz
        window = max(1, round(min(self._options.window_s * self.frame_rate_hz, longest)))
        margin = round(self._options.overlap_s * self.frame_rate_hz / 2)
        if window <= 2 * margin:
            raise UserError(
                f"{folder}: its longest input is {window / self.frame_rate_hz:g} s: --speech-overlap {self._options.overlap_s:g} "
                "must be less than half of it"
            )
        return window, margin

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint: everything that the features depend on."""
        many = self._options.layers is not None
        return {
            "name": self.name,
            "backbone": self._backbone,
            "layer": None if many or not self._layers else self._layers[0],
            "layers": list(self._layers) if many else None,
            "normalise": self._input.normalise,
            "window_s": self._options.window_s,
            "overlap_s": self._options.overlap_s,
            "package": "transformers",
            "version": version("transformers"),
            "weights_sha256": self._weights_sha256,
        }

    def extract(self, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        """Return float16 [T, C] per waveform. Audio shorter than one frame is padded to one frame."""
        with np.errstate(over="ignore"):  # the store refuses features beyond float16
            return [None if waveform is None else self.frames(waveform).astype("float16") for waveform in inputs]

    @torch.inference_mode()
    def frames(self, waveform: np.ndarray) -> np.ndarray:
        """Return the frames of a waveform [S], float32 [T, C]."""
        prepared, count = self._input.prepared(waveform)
        parts = []
        for first, last, start, stop in windows(count, self._window, self._margin):
            inputs = {name: value.to(self._device) for name, value in self._input.part(prepared, first, last).items()}
            hidden_tc = self._hidden(inputs)[: last - first]
            parts.append(hidden_tc[start - first : stop - first].float().cpu().numpy())
        return np.concatenate(parts)

    def _hidden(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        output = self._model(**inputs, output_hidden_states=bool(self._layers))
        if not self._layers:
            return output.last_hidden_state[0]
        hidden = [output.hidden_states[layer][0] for layer in self._layers]
        return hidden[0] if len(hidden) == 1 else torch.stack(hidden).mean(0)


class _Input(ABC):
    """How audio becomes the input of a network."""

    #: Samples per frame.
    hop: int
    #: Frames of the network's longest input; None: no limit.
    longest: int | None = None
    #: Whether the waveform is normalised; None where the network has a spectrogram of its own.
    normalise: bool | None = None

    @abstractmethod
    def __init__(self, folder: Path, config: Any, options: HFSpeechOptions) -> None:
        """Read the settings of the folder. Raise UserError if they are missing or not supported."""

    @abstractmethod
    def prepared(self, waveform: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the input of the complete audio, and the number of its frames."""

    @abstractmethod
    def part(self, prepared: np.ndarray, first: int, last: int) -> dict[str, torch.Tensor]:
        """Return the network's arguments for the frames from `first` to `last`, exclusive."""


class _Waveform(_Input):
    """The waveform itself, normalised over the complete audio if the model requires it."""

    def __init__(self, folder: Path, config: Any, options: HFSpeechOptions) -> None:
        settings = read_processor(folder, "feature_extractor")
        if settings is None and options.normalise is None:
            raise UserError(
                f"{folder}: no preprocessor_config.json there, which says whether it normalises its input: set "
                "--extractor-option audio.normalise=true or false"
            )
        own = _processor("Wav2Vec2FeatureExtractor", ("do_normalize", "sampling_rate"), settings or {}, folder)
        self.normalise = bool(own.do_normalize) if options.normalise is None else options.normalise
        self.hop, self._receptive = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            self._receptive += (kernel - 1) * self.hop
            self.hop *= stride

    def prepared(self, waveform: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the waveform, at least as long as one frame, and the number of frames."""
        if self.normalise:
            waveform = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
        padded = np.pad(waveform, (0, max(0, self._receptive - len(waveform)))).astype("float32")
        return padded, (len(padded) - self._receptive) // self.hop + 1

    def part(self, prepared: np.ndarray, first: int, last: int) -> dict[str, torch.Tensor]:
        """Return the samples that the frames see; all of them for all frames, since a group norm sees the rest too."""
        is_whole = first == 0 and last * self.hop + self._receptive > len(prepared)
        samples = prepared if is_whole else prepared[first * self.hop : (last - 1) * self.hop + self._receptive]
        return {"input_values": torch.from_numpy(samples)[None]}


class _FilterBank(_Input):
    """wav2vec2-BERT's mel filter bank: pairs of frames of 10 ms, normalised per bin over the complete audio."""

    _shortest = 560  # samples of two frames of the filter bank, which make one of the network

    def __init__(self, folder: Path, config: Any, options: HFSpeechOptions) -> None:
        keys = ("feature_size", "num_mel_bins", "sampling_rate", "stride", "padding_value")
        self._extractor = _processor("SeamlessM4TFeatureExtractor", keys, _settings(folder, options), folder)
        width = self._extractor.num_mel_bins * self._extractor.stride
        if width != config.feature_projection_input_dim or self._extractor.stride != 2:
            raise UserError(
                f"{folder}: its preprocessor_config.json makes frames of {width} numbers, its network takes "
                f"{config.feature_projection_input_dim}: download the folder again"
            )
        self.hop = 160 * self._extractor.stride

    def prepared(self, waveform: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the frames of the filter bank [T, bins], without the padding of the last pair."""
        padded = np.pad(waveform, (0, max(0, self._shortest - len(waveform)))).astype("float32")
        found = self._extractor(padded, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np")
        count = int(found["attention_mask"][0].sum())
        return found["input_features"][0][:count], count

    def part(self, prepared: np.ndarray, first: int, last: int) -> dict[str, torch.Tensor]:
        """Return the frames of the filter bank."""
        return {"input_features": torch.from_numpy(prepared[first:last])[None].float()}


class _WhisperSpectrogram(_Input):
    """Whisper's log-mel spectrogram of one window, padded with silence to the network's fixed length."""

    def __init__(self, folder: Path, config: Any, options: HFSpeechOptions) -> None:
        keys = ("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft", "padding_value")
        self._extractor = _processor("WhisperFeatureExtractor", keys, _settings(folder, options), folder)
        own = self._extractor
        if own.feature_size != config.num_mel_bins or own.nb_max_frames != 2 * config.max_source_positions:
            raise UserError(
                f"{folder}: its preprocessor_config.json makes {own.feature_size} bins of {own.nb_max_frames} frames, its "
                f"network takes {config.num_mel_bins} of {2 * config.max_source_positions}: download the folder again"
            )
        self.hop, self.longest = 2 * own.hop_length, int(config.max_source_positions)

    def prepared(self, waveform: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the waveform and the number of its frames, those of the padding left out."""
        return waveform.astype("float32"), max(1, -(-len(waveform) // self.hop))

    def part(self, prepared: np.ndarray, first: int, last: int) -> dict[str, torch.Tensor]:
        """Return the spectrogram of the frames' samples."""
        samples = prepared[first * self.hop : last * self.hop]
        found = self._extractor(samples, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np")
        return {"input_features": torch.from_numpy(np.asarray(found["input_features"], dtype="float32"))}


_INPUTS: dict[str, type[_Input]] = {"wav2vec2-bert": _FilterBank, "whisper": _WhisperSpectrogram}


def _fields(folder: Path, named: str | None) -> tuple[dict[str, Any], str]:
    """Return the fields of a folder's config.json and its model_type. UserError for another folder than is named, or a file."""
    if not folder.exists():
        raise UserError(f"{folder}: no such folder ({_WHAT})")
    if folder.is_file():
        refuse_fairseq(folder)
        raise UserError(f"{folder}: a file, not a folder: name the Hugging Face folder with its config.json ({_WHAT})")
    return read_fields(folder, named, MODELS, reader="hf_speech", kind="speech encoder", option="set audio.backbone=")


def _load(folder: Path, config: Any, model_type: str) -> torch.nn.Module:
    """Return the encoder with its weights. Adapters, which lower the frame rate, are left out."""
    state: Tensors = read_folder(folder, _WHAT)
    name = MODELS[model_type]
    if model_type == "whisper":
        state = {key.removeprefix("model.").removeprefix("encoder."): value for key, value in without(state, _DECODER).items()}
    model = load_model(
        _encoder_class(name, folder), config, without(state, _HEADS), folder, f"the {name} of its config.json", _MASK
    )
    for part in ("adapter", "intermediate_ffn"):
        if getattr(model, part, None) is not None:
            setattr(model, part, None)
    return model


def _encoder_class(name: str, folder: Path) -> Any:
    """Return the class of an encoder. UserError if the installed transformers does not have it."""
    if name != "WhisperEncoder":
        return model_class(name, folder)
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder


def _settings(folder: Path, options: HFSpeechOptions) -> dict[str, Any]:
    """Return the settings of a feature extractor with a spectrogram. UserError without them, or for `normalise`."""
    if options.normalise is not None:
        raise UserError(f"{folder}: its input is a spectrogram, normalised as the model requires: omit audio.normalise")
    settings = read_processor(folder, "feature_extractor")
    if settings is None:
        raise UserError(f"{folder}: no preprocessor_config.json there, which describes its spectrogram: download it too")
    return settings


def _processor(name: str, keys: Sequence[str], settings: Mapping[str, Any], folder: Path) -> Any:
    """Return the feature extractor of a folder. UserError for one of another class or sample rate."""
    found = build_processor((name,), settings, keys, name, folder)
    if found.sampling_rate != SAMPLE_RATE_HZ:
        raise UserError(f"{folder}: it was trained on audio of {found.sampling_rate} Hz, only {SAMPLE_RATE_HZ} is supported")
    return found
