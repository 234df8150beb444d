"""Images and audio in the forms that Python programs use: files, Pillow images, NumPy arrays."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from opt_ds.decoding.audio import RATES_HZ, SAMPLE_RATE_HZ, resample
from opt_ds.decoding.images import to_rgb
from opt_ds.decoding.reasons import RefusedError
from opt_ds.errors import UserError

#: A file, a Pillow image of any mode, or uint8 [height, width], [height, width, 3 or 4].
ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray
#: A file, mono samples [n] at 16 kHz, or (samples [n], rate in Hz). Samples: float in −1 … 1, or int16, int32, uint8 as
#: in WAV.
AudioInput = str | os.PathLike[str] | np.ndarray | tuple[np.ndarray, int]

#: Integer dtype -> (its zero, its largest magnitude).
_INTEGER_SAMPLES = {"uint8": (128, 2**7), "int16": (0, 2**15), "int32": (0, 2**31)}
_LOUDEST = 8.0  # Files of floats exceed 1 slightly; integers that were cast without scaling exceed this.


def check_text(text: object) -> str:
    """Return the text. Raise UserError for another type and for text that is not Unicode (lone surrogates)."""
    if not isinstance(text, str):
        raise UserError(f"text: expected a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text: character {error.start + 1} is a lone surrogate: decode the text as UTF-8") from None
    return text


def check_image(image: ImageInput) -> Path | Image.Image:
    """Return a path unchanged, and any other image as RGB.

    As for files, the EXIF orientation is applied and transparency is rendered on white. Raise UserError for another
    type, shape or dtype, and for an image that Pillow cannot decode.
    """
    if isinstance(image, (str, os.PathLike)):
        return Path(image)
    if isinstance(image, np.ndarray):
        image = _image_of_array(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"image: expected a path, a PIL.Image or a NumPy array, got {type(image).__name__}")
    try:
        return to_rgb(image)
    except RefusedError as error:
        raise UserError(f"image: {error}") from None
    except (OSError, ValueError, SyntaxError) as error:  # raised by Pillow for a broken file that was opened lazily
        raise UserError(f"image: cannot be decoded ({error}): give another image") from None


def check_audio(audio: AudioInput) -> Path | np.ndarray:
    """Return a path unchanged, and any other audio as mono float32 [n] at 16 kHz.

    Raise UserError for another type, shape, dtype or rate, and for samples that are empty, not finite or far outside −1
    … 1.
    """
    if isinstance(audio, (str, os.PathLike)):
        return Path(audio)
    samples, rate_hz = audio if isinstance(audio, tuple) and len(audio) == 2 else (audio, SAMPLE_RATE_HZ)
    if not isinstance(samples, np.ndarray) or isinstance(rate_hz, bool) or not isinstance(rate_hz, (int, np.integer)):
        raise UserError("audio: expected a path, a NumPy array of samples at 16 kHz, or (samples, rate in Hz)")
    if samples.ndim != 1 or not len(samples):
        raise UserError(f"audio: expected mono samples of shape [n], got {list(samples.shape)}: average the channels first")
    if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
        raise UserError(f"audio: a rate of {rate_hz} Hz: give one from {RATES_HZ[0]} to {RATES_HZ[1]}")
    return resample(_float_samples(samples), int(rate_hz))


def _image_of_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise UserError(f"image: an array of {array.dtype}: give uint8 values from 0 to 255")
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        shape = list(array.shape)
        raise UserError(f"image: an array of shape {shape}: give [height, width], [height, width, 3] or [height, width, 4]")
    return Image.fromarray(np.ascontiguousarray(array))


def _float_samples(samples: np.ndarray) -> np.ndarray:
    if samples.dtype.name in _INTEGER_SAMPLES:
        zero, largest = _INTEGER_SAMPLES[samples.dtype.name]
        return ((samples.astype(np.float64) - zero) / largest).astype(np.float32)
    if not np.issubdtype(samples.dtype, np.floating):
        raise UserError(f"audio: an array of {samples.dtype}: give float samples in -1 to 1, or int16, int32, uint8")
    found = samples.astype(np.float32)
    if not np.isfinite(found).all():
        raise UserError("audio: samples are NaN or infinite")
    if np.abs(found).max() > _LOUDEST:
        raise UserError(f"audio: samples reach {np.abs(found).max():g}: scale them to -1 to 1 (int16 values: divide by 32768)")
    return found
