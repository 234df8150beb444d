"""Picture files of any usual kind as RGB: JPEG, PNG, WebP, HEIC, SVG and more; palette, grey, transparent ones on white.

A file is not trusted: its size is read before a pixel is decoded, and a drawing's references to other files are refused.
"""

import codecs
import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pi_heif
from PIL import Image, ImageOps

SVG_SIDE = 256  # an SVG has no size of its own in pixels
_SVG_TALLEST = 8 * SVG_SIDE
PIXELS_SIDE = 64
MAX_PIXELS = 100_000_000
# Pillow would also open PostScript (by starting Ghostscript) and dozens of formats that nobody trains on.
Image.init()
pi_heif.register_heif_opener()
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000")
_FORMATS: list[str] = [name for name in _WANTED if name in Image.OPEN]
# Our own limit, a setting, is checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


def load_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the file's picture as RGB, drawn on white, turned upright by its EXIF tag; of an animation the first frame.

    16-bit grey becomes 8-bit by its high byte. Raises ValueError for a picture of more than `max_pixels` (before it is
    decoded) or of a depth that has no fixed range, and for a drawing that refers to other files; OSError, ValueError or
    another exception of the decoder for a broken file.
    """
    if _is_drawing(path):
        return _on_white(_draw(path))
    with Image.open(path, formats=_FORMATS) as file:
        width, height = file.size
        if width * height > max_pixels:
            raise ValueError(f"{width} x {height} pixels are more than {max_pixels} (--max-pixels)")
        if file.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(file) >> 8).astype("uint8"))
        elif file.mode in ("I", "F"):
            raise ValueError(f"its values (mode {file.mode}) have no fixed range: save it with 8 or 16 bits a channel")
        else:
            file.load()
            picture = file
        return _on_white(ImageOps.exif_transpose(picture))


def to_pixels(picture: Image.Image) -> np.ndarray:
    """Return the picture's centre square as uint8 [3, 64, 64] (as DALL-E prepares pictures for its dVAE)."""
    square = ImageOps.fit(picture, (PIXELS_SIDE, PIXELS_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(square).transpose(2, 0, 1).copy()


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _is_drawing(path: Path) -> bool:
    """Whether the file is XML: no other picture begins as a tag does."""
    with open(path, "rb") as file:
        return file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"<")


def _draw(path: Path) -> Image.Image:
    import resvg_py

    _refuse_references(path)
    # Without system fonts a drawing is the same on every machine (and nine times faster). The height only bounds: a
    # drawing keeps its shape.
    drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=SVG_SIDE, height=_SVG_TALLEST, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(drawn)))


def _refuse_references(path: Path) -> None:
    """The renderer reads local files that a drawing names: nobody's private file may get into a store that way."""
    for _, element in ElementTree.iterparse(path):
        for name, value in element.attrib.items():
            inside = value.lstrip().startswith(("#", "data:"))
            if name.rsplit("}")[-1] == "href" and not inside and not element.tag.endswith("}a"):
                raise ValueError(f'the drawing refers to "{value[:80]}": other files are never fetched')
