"""The content of image and audio files, decoded as commands decode them."""

from pathlib import Path

import numpy as np
from PIL import Image

from opt_ds.decoding.decoder import own_decoder
from opt_ds.decoding.limits import MAX_SECONDS, Limits


def image_of(path: Path) -> Image.Image:
    """The image of a file as RGB."""
    return own_decoder().image(path).content


def audio_of(path: Path, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """The audio of a file as mono float32 at 16 kHz."""
    return own_decoder().audio(path, Limits(max_seconds=max_seconds)).content
