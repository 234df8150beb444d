"""Settings of `opt-ds prepare`: how features are extracted. Equal settings and inputs produce equal bytes."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from opt_ds.config.section import Section
from opt_ds.decoding.limits import MAX_PIXELS, MAX_SECONDS, Limits
from opt_ds.errors import did_you_mean
from opt_ds.features.text import UNICODE_FORMS


class PrepareSettings(Section):
    """How `opt-ds prepare` and `opt-ds update` extract features. Their options set these keys."""

    label: ClassVar[str] = "preparation settings"

    images: str = Field(
        "grid",
        description="Extractor of image regions: grid (cells of a classifier), faster_rcnn, or npz (files made "
        "by one).",
    )
    image_weights: Path | None = Field(
        None,
        description="State dict of the detector or backbone. None: the weights of the extractor's package, if it "
        "has any.",
    )
    image_backbone: str | None = Field(
        None,
        description="grid: torchvision's name of the backbone of `image_weights`, or timm/NAME. None: the "
        "extractor's own.",
    )
    image_min_side: int = Field(
        600, ge=1, description="faster_rcnn: pixels that the shorter side of an image is scaled to."
    )
    image_max_side: int = Field(
        1000, ge=1, description="faster_rcnn: largest longer side in pixels; images are scaled less then."
    )
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, description="Largest image, in pixels. Larger ones are refused before decoding."
    )
    pixels: bool = Field(True, description="Store each image at 64 × 64 pixels too, for the dVAE and picture grids.")
    speech: str = Field("logmel", description="Extractor of audio frames: logmel or wav2vec2.")
    speech_weights: Path | None = Field(
        None, description="wav2vec2: a torchaudio state dict or a Hugging Face folder. logmel needs none."
    )
    speech_layer: int | None = Field(
        None, description="wav2vec2: Transformer layer whose output is taken, counted from 1. None: the last one."
    )
    speech_window_s: float = Field(
        30.0, description="wav2vec2: length of the windows that longer audio is split into, in seconds."
    )
    speech_overlap_s: float = Field(2.0, description="wav2vec2: overlap of neighbouring windows, in seconds.")
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
        if not 0 <= 2 * self.speech_overlap_s < self.speech_window_s:
            raise ValueError(
                f"--speech-overlap {self.speech_overlap_s:g}: must be less than half of --speech-window {self.speech_window_s:g}"
            )
        return self

    def decoding_limits(self) -> Limits:
        """Return the decoding limits that follow from these settings."""
        return Limits(max_pixels=self.max_pixels, max_seconds=self.max_seconds)
