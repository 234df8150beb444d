"""Settings of `opt-ds prepare`: how features are extracted. Equal settings and inputs produce equal bytes."""

import logging
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from opt_ds.config.section import Section
from opt_ds.decoding.limits import MAX_PIXELS, MAX_SECONDS, Limits
from opt_ds.errors import UserError, did_you_mean
from opt_ds.features.extractors import Extractor, ExtractorChoice, choose, extractor_class, option_of
from opt_ds.features.text import UNICODE_FORMS
from opt_ds.ingest.manifest import FIELDS, FILE_FIELDS
from opt_ds.registry import EXTRACTORS
from opt_ds.store.schema import modality_name_problem

_LOG = logging.getLogger(__name__)
#: Modality -> setting -> option of the extractor. The settings are older than the options of extractors.
_SHARED_OPTIONS = {
    "image": {
        "image_weights": "weights",
        "image_backbone": "backbone",
        "image_min_side": "min_side",
        "image_max_side": "max_side",
    },
    "audio": {
        "speech_weights": "weights",
        "speech_layer": "layer",
        "speech_window_s": "window_s",
        "speech_overlap_s": "overlap_s",
    },
}
# Weights, options and clusters identify a preparation by their content.
_IN_FINGERPRINTS = {"image_weights", "speech_weights", "extractors", "extractor_options", "image_labels"}


class PrepareSettings(Section):
    """How `opt-ds prepare` and `opt-ds update` extract features. Their options set these keys."""

    label: ClassVar[str] = "preparation settings"

    images: str = Field(
        "grid",
        description="Extractor of image regions: grid (cells of a classifier), faster_rcnn, vit (patches of a vision "
        "transformer), hf_detector (object queries), region_files (own features), npz (UNITER's files), the name of an "
        "installed package's (entry points `opt_ds.features`), or `module:Class`.",
    )
    image_weights: Path | None = Field(
        None,
        description="State dict of the detector or backbone; vit: a folder. None: the weights of the extractor's package, if "
        "it has any.",
    )
    image_backbone: str | None = Field(
        None,
        description="grid: torchvision's name of the backbone of `image_weights`, or timm/NAME. vit: the architecture that "
        "they must have. None: the extractor's own.",
    )
    image_min_side: int = Field(
        600, ge=1, description="faster_rcnn: pixels that the shorter side of an image is scaled to."
    )
    image_max_side: int = Field(
        1000, ge=1, description="faster_rcnn: largest longer side in pixels; images are scaled less then."
    )
    image_labels: str | None = Field(
        None,
        description="Classes of the regions for MRC: kmeans:K finds K clusters of the train split's features; the folder of a "
        "store or run takes its clusters. None: the classes of the extractor, if it has any.",
    )
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, description="Largest image, in pixels. Larger ones are refused before decoding."
    )
    pixels: bool = Field(True, description="Store each image at 64 × 64 pixels too, for the dVAE and image grids.")
    speech: str = Field(
        "logmel",
        description="Extractor of audio frames: logmel, hf_speech (speech encoders of Hugging Face), wav2vec2, frame_files (own "
        "features), the name of an installed package's, or `module:Class`.",
    )
    speech_weights: Path | None = Field(
        None,
        description="hf_speech: a Hugging Face folder. wav2vec2: that or a torchaudio state dict. logmel needs none.",
    )
    speech_layer: int | None = Field(
        None, description="hf_speech, wav2vec2: layer whose output is taken, counted from 1. None: the last one."
    )
    speech_window_s: float = Field(
        30.0, description="hf_speech, wav2vec2: length of the windows that longer audio is split into, in seconds."
    )
    speech_overlap_s: float = Field(2.0, description="hf_speech, wav2vec2: overlap of neighbouring windows, in seconds.")
    extractors: dict[str, str] = Field(
        default_factory=dict,
        description="Name of a further modality -> its extractor: the name of an installed package's, or `module:Class`. The "
        "manifest then has a field of this name, which names a file.",
    )
    extractor_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Modality -> options of its extractor, such as `image: {side: 224}`. They are part of its fingerprint.",
    )
    trim_silence: bool = Field(False, description="Remove the silence at both ends of the audio.")
    pool_frames: int = Field(1, ge=1, description="Number of neighbouring audio frames that are averaged into one.")
    max_frames: int | None = Field(
        None,
        ge=1,
        description="Longest audio, in frames after pooling. Longer audio is truncated and counted. None: no limit.",
    )
    max_seconds: float = Field(
        MAX_SECONDS, gt=0, description="Longest audio, in seconds. Longer audio is refused before decoding."
    )
    text: Path | None = Field(
        None, description="Hugging Face folder of a WordPiece tokenizer. None: train one on the train split's texts."
    )
    vocab_size: int = Field(1200, ge=1, description="Vocabulary size of the tokenizer that is trained.")
    unicode_form: str = Field("NFC", description=f"Unicode normal form of texts: {', '.join(UNICODE_FORMS)}.")
    max_tokens: int | None = Field(  # BERT's 512 positions, less [CLS] and [SEP]
        510, ge=1, description="Longest text, in tokens. Longer texts are truncated and counted. None: no limit."
    )
    samples_per_shard: int = Field(
        1024, ge=1, description="Samples per file of the store. A stopped run resumes after a file."
    )
    compression: Literal["gzip"] | None = Field(
        None, description="Compression of the store's files: gzip for archives, slower to read. None: uncompressed."
    )

    @model_validator(mode="after")
    def _check(self) -> "PrepareSettings":
        if self.unicode_form not in UNICODE_FORMS:
            near = did_you_mean(self.unicode_form, UNICODE_FORMS)
            raise ValueError(f'--unicode-form "{self.unicode_form}": unknown{near}: choose {", ".join(UNICODE_FORMS)}')
        for kind in self.extractors:
            if kind in FILE_FIELDS:
                raise ValueError(f"--extractor {kind}: name the extractor with {option_of(kind)}")
            problem = modality_name_problem(kind) or (f'"{kind}" is a field of manifests' if kind in FIELDS else None)
            if problem is not None:
                raise ValueError(f"--extractor {kind}: {problem}: choose another name")
        for kind in self.extractor_options:
            if kind not in self.file_kinds:
                known = ", ".join(self.file_kinds)
                raise ValueError(f'extractor_options: no modality "{kind}"{did_you_mean(kind, self.file_kinds)}: choose {known}')
        if not 0 <= 2 * self.speech_overlap_s < self.speech_window_s:
            raise ValueError(
                f"--speech-overlap {self.speech_overlap_s:g}: must be less than half of --speech-window {self.speech_window_s:g}"
            )
        return self

    @property
    def file_kinds(self) -> tuple[str, ...]:
        """The modalities whose features are extracted from files, in the order of the store's columns."""
        return (*FILE_FIELDS, *sorted(self.extractors))

    def extractor(self, kind: str) -> ExtractorChoice:
        """Return the extractor of a modality. The user has named it, so `module:Class` is loaded.

        Raise UserError if there is none of this name, or if it does not have an option that is set.
        """
        given = {"image": self.images, "audio": self.speech, **self.extractors}[kind]
        EXTRACTORS.allow([given])
        found = extractor_class(kind, given, option_of(kind))
        if kind == "audio" and self.trim_silence and found.reads_files:
            raise UserError(f"--trim-silence: {given} reads files of features, which have no silence to remove: leave it out")
        options = {**self._shared_options(found, given), **self.extractor_options.get(kind, {})}
        return choose(kind, given, options)

    def hashed(self) -> dict[str, str]:
        """Return the settings that identify a preparation, as text.

        Weights and the options of extractors are left out: the extractors' fingerprints have them.
        """
        return {name: str(value) for name, value in self.model_dump(exclude=_IN_FINGERPRINTS).items()}

    def _shared_options(self, found: type[Extractor], given: str) -> dict[str, Any]:
        """Return the options that have a setting of their own here, such as `image_weights`.

        A number is passed on if it is not the default and the extractor's own default is the same one.
        """
        options: dict[str, Any] = {}
        for setting, name in _SHARED_OPTIONS.get(found.kind, {}).items():
            value, default = getattr(self, setting), type(self).model_fields[setting].default
            if value == default:
                continue
            own = found.options.model_fields.get(name)
            flag = f"--{setting.removesuffix('_s').replace('_', '-')}"
            if own is not None and (default is None or own.default == default):
                if name in self.extractor_options.get(found.kind, {}):
                    raise UserError(f"{flag} and --extractor-option {found.kind}.{name} are the same option: give one of them")
                options[name] = value
            elif own is not None:
                raise UserError(f"{flag}: give {given} this option with --extractor-option {found.kind}.{name}={value}")
            elif default is None:
                raise UserError(f"{flag}: {given} has no option {name}: leave it out")
            else:
                _LOG.warning(f"{flag} {value:g} is not used: {given} has no option {name}")
        return options

    def decoding_limits(self) -> Limits:
        """Return the decoding limits that follow from these settings."""
        return Limits(max_pixels=self.max_pixels, max_seconds=self.max_seconds)
