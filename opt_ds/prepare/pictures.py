"""Picture files of any usual kind as RGB: JPEG, PNG, WebP and SVG; palette, grey and transparent ones on white."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SVG_SIDE = 256  # an SVG has no size of its own in pixels
PIXELS_SIDE = 64


def load_picture(path: Path) -> Image.Image:
    """Return the file's picture as RGB, drawn on white, turned upright by its EXIF tag.

    Raises OSError, ValueError or another exception of the decoder for a broken file.
    """
    if path.suffix.lower() == ".svg":
        import resvg_py

        # Without system fonts a drawing is the same on every machine (and nine times faster).
        drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=SVG_SIDE, skip_system_fonts=True)
        picture: Image.Image = Image.open(io.BytesIO(bytes(drawn)))
    else:
        picture = Image.open(path)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        raise ValueError(f"picture mode {picture.mode} (more than 8 bits a channel) is not supported")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def to_pixels(picture: Image.Image) -> np.ndarray:
    """Return the picture's centre square as uint8 [3, 64, 64] (as DALL-E prepares pictures for its dVAE)."""
    square = ImageOps.fit(picture, (PIXELS_SIDE, PIXELS_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(square).transpose(2, 0, 1).copy()
