"""Conversion of raw text, images and audio to model inputs, with the extractors that were used in training."""

import logging
import re
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opt_ds.config import ModelConfig
from opt_ds.data.lengths import stacked_length
from opt_ds.data.modality import modalities_of
from opt_ds.data.sample import Sample
from opt_ds.decoding.decoder import Decoder, DecodingError, EnvironmentFaultError
from opt_ds.decoding.limits import Limits
from opt_ds.errors import UserError, did_you_mean
from opt_ds.features.extractors import choose, difference, extractor_class, named_in
from opt_ds.serving.inputs import AudioInput, ImageInput, check_audio, check_image, check_text
from opt_ds.store.clusters import IMAGE_LABELS, load_clusters
from opt_ds.store.processor_files import load_processor_description
from opt_ds.store.schema import MODALITIES, TOKENIZER_FOLDER

_LOG = logging.getLogger(__name__)
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
        extractor_options: Modality -> further options of its extractor that are not in its fingerprint, such as files.
        device: Device of the extractors.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        *,
        image_weights: Path | None = None,
        speech_weights: Path | None = None,
        extractor_options: Mapping[str, Mapping[str, Any]] | None = None,
        device: str = "cpu",
    ) -> None:
        from opt_ds.features.text import TextExtractor

        self.folder, self.config, self._device = folder, config, device
        self.description = load_processor_description(folder)
        self._weights = {"image": image_weights, "audio": speech_weights}
        self._options = extractor_options or {}
        for kind in self._options:
            if kind not in self._file_kinds:
                near = did_you_mean(kind, self._file_kinds)
                raise UserError(f'--extractor-option {kind}: the model has no extractor of "{kind}"{near}: leave it out')
        self._modalities = {modality.name: modality for modality in modalities_of(config)}
        self._decoder, self._limits = Decoder(), Limits()
        self._notes: list[str] | None = None  # warnings of one request; None: they are logged
        for size in ("vocab_size", "image_feature_dim", "audio_feature_dim"):
            own, theirs = getattr(self.description.dims, size), getattr(config, size)
            if own != theirs:
                raise UserError(f"{folder}: its {size} is {own}, the model's is {theirs}: it belongs to another model")
        form = self.description.extractors["text"].get("unicode_form", "none")
        self._text = TextExtractor(folder / TOKENIZER_FOLDER, form)
        self._extractors: dict[str, Any] = {}
        self._clusters = load_clusters(folder, self.description.extractors)

    def __call__(
        self,
        text: str | None = None,
        image: ImageInput | None = None,
        audio: AudioInput | None = None,
        **further: str | Path,
    ) -> Sample:
        """Return a sample with one or several of text, image, audio and the model's further modalities.

        See `opt_ds.serving.inputs` for the types. A further modality is given as a file.

        Raise UserError for no input at all, an input of another type, an empty text, a broken file, an unknown modality, and
        an extractor that is not the training store's.
        """
        if text is None and image is None and audio is None and not further:
            raise UserError("no input: give a text, an image, audio, or several of them")
        for name in further:
            if name not in self.further:
                known = (*MODALITIES, *self.further)
                raise UserError(f'no modality "{name}"{did_you_mean(name, known)}: the model reads {", ".join(known)}')
        sample = Sample(name="raw input")
        if text is not None:
            self._add_text(sample, check_text(text))
        if image is not None:
            self._add_image(sample, check_image(image))
        if audio is not None:
            self._add_audio(sample, check_audio(audio))
        for name, file in further.items():
            columns = self.columns(name, file)
            self._add(sample, name, columns, len(columns["features"]), f"{name} {Path(file).name}")
        return sample

    def columns(self, kind: str, file: str | Path) -> dict[str, np.ndarray]:
        """Return the columns of a file of a modality besides text, image and audio, as a store has them.

        Raise UserError for a modality that the model has no extractor of, a file that cannot be read, and an extractor that
        is not the training store's.
        """
        if kind not in self._file_kinds or kind in MODALITIES:
            near = did_you_mean(kind, self._file_kinds)
            raise UserError(f'no modality "{kind}"{near}: the model has extractors of {", ".join(self._file_kinds)}')
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(f"{kind} {path}: no such file")
        extractor = self._extractor(kind)
        try:
            (found,) = extractor.extract([path])
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{kind} {path.name}: cannot be read ({reason}): give another file") from None
        if (problem := extractor.problem(found)) is not None:
            raise UserError(f"{kind} {path.name}: {problem}: give another file")
        columns = extractor.modality().columns
        return {name: found[name].astype(stored.dtype, copy=False) for name, stored in columns.items()}

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

    def _add_text(self, sample: Sample, text: str) -> None:
        tokens = self._text.extract([text])[0]
        if not len(tokens):
            raise UserError("the text is empty: give words, or omit it")
        self._add(sample, "text", tokens, len(tokens), "the text")

    def _add_image(self, sample: Sample, image: Path | Image.Image) -> None:
        content = self._decoded(image, "image") if isinstance(image, Path) else image
        found = self._extractor("image").extract([content])[0]
        if not len(found.features):
            raise UserError("no region was found in the image: use another image")
        if self._clusters is not None:
            found = found._replace(labels=self._clusters.labels(found.features))
        self._add(sample, "image", found, len(found.features), "the image")

    def _add_audio(self, sample: Sample, audio: Path | np.ndarray) -> None:
        from opt_ds.decoding.audio import trim_silence
        from opt_ds.features.speech import pool_frames

        waveform = self._decoded(audio, "audio") if isinstance(audio, Path) else audio
        if self.description.extractors["audio"].get("trim_silence"):
            waveform = trim_silence(waveform)
        extractor = self._extractor("audio")
        pooled = round(extractor.frame_rate_hz / self.description.dims.audio_frame_rate_hz)
        frames = pool_frames(extractor.extract([waveform])[0], pooled)
        limit = self._modalities["audio"].limit_note([self.description.dims])
        self._add(sample, "audio", frames, len(frames), f"the audio ({len(waveform) / 16_000:.1f} s)", limit)

    def _add(self, sample: Sample, name: str, features: Any, count: int, what: str, limit_note: str = "") -> None:
        """Add the items of an extractor's features of `count` items, and note whether the model's limit truncates them."""
        modality = self._modalities[name]
        items = int(stacked_length(count, modality.stack))
        if items > modality.limit:
            self._note(f"{what} has {items} {modality.item_word}: only the first {modality.limit}{limit_note} are read")
        sample.items[modality.number] = modality.items_of(features)

    def _note(self, note: str) -> None:
        if self._notes is None:
            _LOG.warning(note)
        else:
            self._notes.append(note)

    def _decoded(self, path: Path, kind: str) -> Any:
        if not path.is_file():
            raise UserError(f"{kind} {path}: no such file")
        decode: Callable[..., Any] = self._decoder.image if kind == "image" else self._decoder.audio
        try:
            return decode(path, self._limits).content
        except DecodingError as error:
            reason = _OPTION_OF_PREPARE.sub("", str(error))
            raise UserError(f"{kind} {path.name}: cannot be read ({reason}): give another file") from None
        except EnvironmentFaultError as fault:
            raise UserError(str(fault)) from None

    @property
    def further(self) -> tuple[str, ...]:
        """The modalities besides text, image and audio that the model reads and has an extractor of."""
        return tuple(name for name in self._modalities if name in self._file_kinds and name not in MODALITIES)

    @property
    def _file_kinds(self) -> list[str]:
        """The modalities that the training store had extracted from files."""
        return [name for name in self.description.extractors if name not in ("text", "codes", IMAGE_LABELS)]

    def open_extractor(self, kind: str) -> None:
        """Build the extractor of a modality, which is otherwise built at first use. Raise UserError if it is not available."""
        self._extractor(kind)

    def _extractor(self, kind: str) -> Any:
        if kind not in self._file_kinds:
            raise UserError(f"the model has no extractor of {kind}: leave the {kind} out")
        if kind not in self._extractors:
            self._extractors[kind] = self._build(kind, self.description.extractors[kind])
        return self._extractors[kind]

    def _build(self, kind: str, fingerprint: dict[str, Any]) -> Any:
        given, where = named_in(fingerprint), f"the model's {kind} extractor"
        found = extractor_class(kind, given, where)
        if kind in _SETTINGS and found.reads_files:
            raise UserError(
                f"the model reads {kind} features from files made elsewhere ({found.name}): it cannot read {kind} files itself"
            )
        options = {"weights": self._weights.get(kind), **self._options.get(kind, {})}
        weights = None if options["weights"] is None else Path(options["weights"]).expanduser()
        self._check_given(kind, found.name, weights, found.needs_weights(fingerprint))
        if weights is None:
            del options["weights"]
        choice = choose(kind, given, {**found.options_from(fingerprint), **options}, where)
        extractor = choice.build(self._device)
        own = choice.complete_fingerprint(extractor)
        if (key := difference(fingerprint, own)) is not None:
            raise UserError(
                f"{kind} extractor {found.name}: its {key} is {own.get(key)}, the model was trained with "
                f"{fingerprint.get(key)}: use the same"
            )
        return extractor

    def _check_given(self, kind: str, name: str, weights: Path | None, needs: bool) -> None:
        option = _SETTINGS.get(kind, f"--extractor-option {kind}.weights")
        if needs and weights is None:
            python = f"{option[2:].replace('-', '_')}=" if kind in _SETTINGS else "extractor_options="
            raise UserError(
                f"the model reads {kind}s with {name}, whose weights are not stored with it: name their file with "
                f"{option} (in Python: {python})"
            )
        if weights is not None and not needs:
            raise UserError(f"the model's {kind} extractor ({name}) has no weights in a file: omit {option}")
        if weights is not None and not weights.exists():
            raise UserError(f"{option} {weights}: no such file or folder")
