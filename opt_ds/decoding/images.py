"""Decode image files of all common formats (JPEG, PNG, WebP, HEIC and more) to RGB, on white.

Files are not trusted. The size is checked before any pixel is decoded, and this code runs in the decoding process
(decoder.py). For SVG see drawings.py.
"""

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from opt_ds.decoding.limits import MIB
from opt_ds.decoding.reasons import RefusedError, unreadable

if TYPE_CHECKING:
    import numpy as np

PIXELS_SIDE = 64
# Pillow could also open PostScript (by starting Ghostscript) and dozens of formats that no training set uses.
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000")
_PLUGINS = ("Jpeg", "Png", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Avif", "Jpeg2K")
# Our own limit, which is a setting, is checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


@functools.cache
def accepted_formats() -> list[str]:
    """Import the decoders of all accepted formats and return Pillow's names of them.

    Only processes that decode need them.
    """
    import pi_heif
    from PIL import AvifImagePlugin, PngImagePlugin

    for plugin in _PLUGINS:
        importlib.import_module(f"PIL.{plugin}ImagePlugin")
    pi_heif.register_heif_opener()
    # Some editors store histories of several megabytes in the text chunks of a PNG.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * MIB
    # One thread, as for each worker of `opt-ds prepare`.
    pi_heif.options.DECODE_THREADS = AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    return [name for name in _WANTED if name in Image.OPEN]


def open_bitmap(file: BinaryIO) -> Image.Image:
    """Open an image and read its header only; no pixel is decoded. Raise what the decoder raises."""
    return Image.open(file, formats=accepted_formats())


def load_bitmap(file: BinaryIO, max_pixels: int, allow: Callable[[int], None]) -> Image.Image:
    """Return the image as RGB on white, rotated by its EXIF tag. For an animation, return the first frame.

    16-bit grey is converted to 8 bits by its high byte.

    Args:
        file: The image file.
        max_pixels: Largest number of pixels that is accepted.
        allow: Called with the number of pixels, before they are decoded.

    Raises:
        RefusedError: The image has more than `max_pixels`, or a depth without a fixed range.
        BrokenFileError: The file has another format.
        OSError, ValueError or another exception of the decoder: The file is damaged.
    """
    try:
        image = open_bitmap(file)
    except UnidentifiedImageError:
        file.seek(0)
        raise unreadable("image", file.read(4096)) from None
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise RefusedError(f"{width} x {height} pixels are more than {max_pixels} (--max-pixels)")
        allow(width * height)
        return to_rgb(image, in_place=True)


def to_rgb(image: Image.Image, *, in_place: bool = False) -> Image.Image:
    """Convert an open image like `load_bitmap`.

    `in_place` may modify the image. Raise RefusedError like `load_bitmap`.
    """
    if image.mode.startswith("I;16"):
        import numpy as np

        return on_white(ImageOps.exif_transpose(Image.fromarray((np.asarray(image) >> 8).astype("uint8"))))
    if image.mode in ("I", "F"):
        raise RefusedError(f"its values (mode {image.mode}) have no fixed range: save it with 8 or 16 bits per channel")
    image.load()
    if in_place:
        ImageOps.exif_transpose(image, in_place=True)  # copies only if the image has to be rotated
        return on_white(image)
    return on_white(ImageOps.exif_transpose(image))


def to_pixels(image: Image.Image) -> "np.ndarray":
    """Return the centre square of the image as uint8 [3, 64, 64] (as DALL-E prepares images for its dVAE)."""
    import numpy as np

    square = ImageOps.fit(image, (PIXELS_SIDE, PIXELS_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(square).transpose(2, 0, 1).copy()


def on_white(image: Image.Image) -> Image.Image:
    """Return the image as RGB, with white where it is transparent."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
