"""Draw a scene: pictograms in their cells on a ground of one colour. The bytes depend on the scene only."""

import io

import numpy as np
from PIL import Image

from opt_ds.scenes.layout import GRID
from opt_ds.scenes.pictograms import pictogram
from opt_ds.scenes.truth import Scene
from opt_ds.scenes.vocabulary import GROUNDS

#: Side of an image in pixels: what the default image extractor reads, so that nothing is scaled there.
IMAGE_SIDE = 192
#: Empty margin within a cell, as a fraction of an image code.
_MARGIN = 0.15


def draw(scene: Scene, side: int = IMAGE_SIDE) -> Image.Image:
    """Return the image of a scene, RGB [side, side]. `side` is a multiple of 8."""
    assert scene.graph.ground is not None, "a scene has a ground"
    code = side // GRID
    picture = Image.new("RGBa", (side, side), (*GROUNDS[scene.graph.ground], 255))
    for item in scene.objects:
        icon = object_icon(item.kind, item.colour, scene.style, item.cell.side * code, code)
        corner = (item.cell.x * code, item.cell.y * code)
        below = picture.crop((*corner, corner[0] + icon.width, corner[1] + icon.height))
        picture.paste(_over(icon, below), corner)
    return picture.convert("RGBA").convert("RGB")


def png_bytes(scene: Scene) -> bytes:
    """Return the image of a scene as a PNG file."""
    buffer = io.BytesIO()
    draw(scene).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def object_icon(kind: str, colour: str | None, style: str, side: int, code: int) -> Image.Image:
    """Return an object as it is drawn in a cell of `side` pixels: premultiplied RGBa [side, side]."""
    margin = round(_MARGIN * code)
    icon = Image.new("RGBa", (side, side))
    icon.paste(pictogram(kind, colour, style, side - 2 * margin), (margin, margin))
    return icon


def _over(icon: Image.Image, below: Image.Image) -> Image.Image:
    """Return premultiplied `icon` composited over opaque `below`."""
    top, bottom = (np.asarray(image).astype(np.uint16) for image in (icon, below))
    mixed = top + (bottom * (255 - top[..., 3:]) + 127) // 255
    return Image.frombytes("RGBa", icon.size, np.minimum(mixed, 255).astype(np.uint8).tobytes())
