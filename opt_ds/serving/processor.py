"""Conversion of raw text, images and audio to model inputs, with the extractors that were used in training."""

import logging
import re
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opt_ds.config import ModelConfig
from opt_ds.data.sample import Sample
from opt_ds.data.samples import stack_frames
from opt_ds.decoding.decoder import Decoder, DecodingError, EnvironmentFaultError
from opt_ds.decoding.limits import Limits
from opt_ds.errors import UserError
from opt_ds.serving.inputs import AudioInput, ImageInput, check_audio, check_image, check_text
from opt_ds.store.processor_files import load_processor_description
from opt_ds.store.schema import TOKENIZER_FOLDER

_LOG = logging.getLogger(__name__)
# Keys of a fingerprint that may differ: they change at most the last bits, or do not concern the extractor.
_MAY_DIFFER = ("version", "package", "precision", "trim_silence")
_OPTION_OF_PREPARE = re.compile(r" \(--max-\w+\)")
_SETTINGS = {"image": "--image-weights", "audio": "--speech-weights"}


class OPTProcessor:
    """Creates samples from raw inputs. Extractors are built at first use and must be those of the training store.

    Inputs that exceed the model's limits are truncated, with a warning.

    Args:
        folder: A folder written by `copy_processor_files`.
        config: The model's configuration.
        image_weights: Weights of an image extractor whose package does not include them.
        speech_weights: Weights of a speech extractor whose package does not include them.
        device: Device of the extractors.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        *,
        image_weights: Path | None = None,
        speech_weights: Path | None = None,
        device: str = "cpu",
    ) -> None:
        from opt_ds.features.text import TextExtractor

        self.folder, self.config, self._device = folder, config, device
        self.description = load_processor_description(folder)
        self._weights = {"image": image_weights, "audio": speech_weights}
        self._decoder, self._limits = Decoder(), Limits()
        self._notes: list[str] | None = None  # warnings of one request; None: they are logged
        for size in ("vocab_size", "image_feature_dim", "audio_feature_dim"):
            own, theirs = getattr(self.description.dims, size), getattr(config, size)
            if own != theirs:
                raise UserError(f"{folder}: its {size} is {own}, the model's is {theirs}: it belongs to another model")
        form = self.description.extractors["text"].get("unicode_form", "none")
        self._text = TextExtractor(folder / TOKENIZER_FOLDER, form)
        self._extractors: dict[str, Any] = {}

    def __call__(
        self,
        text: str | None = None,
        image: ImageInput | None = None,
        audio: AudioInput | None = None,
    ) -> Sample:
        """Return a sample with one, two or three of text, image and audio.

        See `opt_ds.serving.inputs` for their types.

        Raise UserError for no input at all, an input of another type, an empty text, a broken file, and an extractor
        that is not the training store's.
        """
        if text is None and image is None and audio is None:
            raise UserError("no input: give a text, an image, audio, or several of them")
        sample = Sample(name="raw input")
        if text is not None:
            sample.token_ids = self._tokens(check_text(text))
        if image is not None:
            self._read_regions(sample, check_image(image))
        if audio is not None:
            sample.frames = self._frames(check_audio(audio))
        return sample

    def with_notes(
        self, notes: list[str], max_seconds: float | None = None, *, allow_svg: bool = True
    ) -> "OPTProcessor":
        """Return a copy of this processor that appends its warnings to `notes` instead of logging them.

        `max_seconds` limits the duration of audio. `allow_svg` controls whether SVG drawings are accepted.
        """
        other = copy(self)
        other._notes = notes
        other._limits = self._limits.model_copy(
            update={"max_seconds": max_seconds or self._limits.max_seconds, "allow_svg": allow_svg}
        )
        return other

    def close(self) -> None:
        """End the process that decodes files."""
        self._decoder.close()

    def _tokens(self, text: str) -> np.ndarray:
        tokens = self._text.extract([text])[0].astype(np.int64)
        if not len(tokens):
            raise UserError("the text is empty: give words, or omit it")
        return self._cut(tokens, self.config.max_text_tokens, "the text", "WordPieces")

    def _read_regions(self, sample: Sample, image: Path | Image.Image) -> None:
        picture = self._decoded(image, "image") if isinstance(image, Path) else image
        found = self._extractor("image").extract([picture])[0]
        if not len(found.features):
            raise UserError("no region was found in the image: use another image")
        limit = self.config.max_regions
        sample.region_features, sample.region_boxes = found.features[:limit], found.boxes[:limit]
        sample.region_labels = found.labels[:limit].astype(np.int64)

    def _frames(self, audio: Path | np.ndarray) -> np.ndarray:
        from opt_ds.decoding.recordings import trim_silence
        from opt_ds.features.speech import pool_frames

        waveform = self._decoded(audio, "audio") if isinstance(audio, Path) else audio
        if self.description.extractors["audio"].get("trim_silence"):
            waveform = trim_silence(waveform)
        extractor = self._extractor("audio")
        pooled = round(extractor.frame_rate_hz / self.description.dims.audio_frame_rate_hz)
        frames = stack_frames(pool_frames(extractor.extract([waveform])[0], pooled), self.config.audio_stack, 0)
        rate_hz = self.description.dims.audio_frame_rate_hz / self.config.audio_stack
        seconds = f"{len(waveform) / 16_000:.1f} s, the model reads {self.config.max_frames / rate_hz:.1f} s"
        return self._cut(frames, self.config.max_frames, f"the audio ({seconds})", "frames")

    def _decoded(self, path: Path, kind: str) -> Any:
        if not path.is_file():
            raise UserError(f"{kind} {path}: no such file")
        decode: Callable[..., Any] = self._decoder.picture if kind == "image" else self._decoder.recording
        try:
            return decode(path, self._limits).content
        except DecodingError as error:
            reason = _OPTION_OF_PREPARE.sub("", str(error))
            raise UserError(f"{kind} {path.name}: cannot be read ({reason}): give another file") from None
        except EnvironmentFaultError as fault:
            raise UserError(str(fault)) from None

    def _cut(self, items: np.ndarray, limit: int, what: str, unit: str) -> np.ndarray:
        if len(items) > limit:
            note = f"{what} has {len(items)} {unit}: only the first {limit} are read"
            if self._notes is None:
                _LOG.warning(note)
            else:
                self._notes.append(note)
        return items[:limit]

    def _extractor(self, kind: str) -> Any:
        if kind not in self._extractors:
            self._extractors[kind] = self._build(kind, self.description.extractors[kind])
        return self._extractors[kind]

    def _build(self, kind: str, identity: dict[str, Any]) -> Any:
        name, weights = identity["name"], self._weights[kind]
        if kind == "image":
            from opt_ds.features.grid import IMAGENET_MEAN, IMAGENET_STD
            from opt_ds.features.region_extractors import build_region_extractor

            backbone = str(identity.get("backbone", ""))
            own_name = backbone.removeprefix("torchvision/") if "/" in backbone else None
            if name == "npz":
                raise UserError("the model reads regions from files made elsewhere (npz): it cannot look at a picture itself")
            needs = name != "grid" or own_name is not None
            self._check_given(kind, name, weights, needs)
            sides = {side: identity[side] for side in ("min_side", "max_side") if side in identity}
            # Stores whose fingerprint lacks these values were prepared with ImageNet's.
            normalisation = (tuple(identity.get("mean", IMAGENET_MEAN)), tuple(identity.get("std", IMAGENET_STD)))
            extractor: Any = build_region_extractor(
                name, weights=weights, backbone=own_name, device=self._device, normalisation=normalisation, **sides
            )
        else:
            from opt_ds.features.speech import build_speech_extractor

            self._check_given(kind, name, weights, needs=name != "logmel")
            how = {key: identity[key] for key in ("layer", "window_s", "overlap_s") if key in identity}
            extractor = build_speech_extractor(name, weights=weights, device=self._device, **how)
        found = extractor.identity()
        for key in identity.keys() | found.keys():
            if key not in _MAY_DIFFER and identity.get(key) != found.get(key):
                raise UserError(
                    f"{kind} extractor {name}: its {key} is {found.get(key)}, the model was trained with {identity.get(key)}: "
                    "use the same"
                )
        return extractor

    def _check_given(self, kind: str, name: str, weights: Path | None, needs: bool) -> None:
        if needs and weights is None:
            raise UserError(
                f"the model reads {kind}s with {name}, whose weights are not stored with it: name their file with "
                f"{_SETTINGS[kind]} (in Python: {_SETTINGS[kind][2:].replace('-', '_')}=)"
            )
        if weights is not None and not needs:
            raise UserError(f"the model's {kind} extractor ({name}) takes no weights from a file: leave {_SETTINGS[kind]} away")
        if weights is not None and not weights.exists():
            raise UserError(f"{_SETTINGS[kind]} {weights}: no such file or folder")
