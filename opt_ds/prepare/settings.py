"""How features are made: what `opt-ds prepare` can be told. Equal settings and inputs give equal bytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opt_ds.errors import UserError, did_you_mean
from opt_ds.prepare.limits import MAX_PIXELS, MAX_SECONDS, Limits
from opt_ds.prepare.text import UNICODE_FORMS

_AT_LEAST_ONE = (
    "pool_frames",
    "max_frames",
    "vocab_size",
    "max_tokens",
    "max_pixels",
    "samples_per_shard",
    "image_min_side",
    "image_max_side",
)


@dataclass(frozen=True)
class PrepareSettings:
    """Paths are None where the extractor needs none; frames are pooled by mean, then cut.

    `max_tokens`, `max_frames`: longer texts and recordings are cut, and counted in the report. `max_pixels`,
    `max_seconds`: larger files are refused before they are decoded. `speech_layer`: 1 is the first Transformer layer's
    output, None the last one's. `image_min_side`, `image_max_side`: faster_rcnn scales the shorter side to the one unless
    the longer then exceeds the other. `speech_window_s`, `speech_overlap_s`: see Wav2Vec2Extractor.
    """

    images: str = "grid"
    image_weights: Path | None = None
    image_backbone: str | None = None
    image_min_side: int = 600
    image_max_side: int = 1000
    max_pixels: int = MAX_PIXELS
    pixels: bool = True
    speech: str = "logmel"
    speech_weights: Path | None = None
    speech_layer: int | None = None
    speech_window_s: float = 30.0
    speech_overlap_s: float = 2.0
    trim_silence: bool = False
    pool_frames: int = 1
    max_frames: int | None = None
    max_seconds: float = MAX_SECONDS
    text: Path | None = None
    vocab_size: int = 1200
    unicode_form: str = "NFC"
    max_tokens: int | None = 510  # BERT's 512 positions, less [CLS] and [SEP]
    samples_per_shard: int = 1024
    compression: Literal["gzip"] | None = None

    def decoding_limits(self) -> Limits:
        """Return what the decoder needs to know of the settings."""
        return Limits(max_pixels=self.max_pixels, max_seconds=self.max_seconds)

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if not self.max_seconds > 0:
            raise UserError(f"--max-seconds {self.max_seconds:g}: must be more than 0")
        if self.unicode_form not in UNICODE_FORMS:
            near = did_you_mean(self.unicode_form, UNICODE_FORMS)
            raise UserError(f'--unicode-form "{self.unicode_form}": unknown{near}: choose {", ".join(UNICODE_FORMS)}')
        if not 0 <= 2 * self.speech_overlap_s < self.speech_window_s:
            raise UserError(
                f"--speech-overlap {self.speech_overlap_s:g}: must be less than half of --speech-window {self.speech_window_s:g}"
            )
