"""Render vector graphics (SVG) to bitmaps.

Sizes may be in any CSS unit. External references are refused. Embedded bitmaps are limited.
"""

import base64
import binascii
import codecs
import io
import re
import urllib.parse
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import resvg_py
from PIL import Image

from opt_ds.decoding.images import on_white, open_bitmap
from opt_ds.decoding.limits import Limits
from opt_ds.decoding.reasons import BrokenFileError, RefusedError, what_it_is

SVG_SIDE = 256  # pixels; an SVG has no pixel size of its own
_TALLEST = 8 * SVG_SIDE
_DPI = 96.0  # CSS: an inch has 96 pixels
_MOST_LEVELS = 4  # nesting of SVGs in data: URLs
#: Pixels per unit by CSS, for units that the renderer does not support. An "em" is 16 pixels, since there is no page.
_PIXELS_OF = {"q": 96 / 101.6, "rem": 16.0, "ch": 8.0, "lh": 19.2, "rlh": 19.2, "cap": 11.2, "ic": 16.0}
_PERCENT = ("vw", "vh", "vmin", "vmax", "vi", "vb")
_KNOWN = {"px": 1.0, "pt": 96 / 72, "pc": 16.0, "in": 96.0, "cm": 96 / 2.54, "mm": 96 / 25.4, "em": 16.0, "ex": 8.0}
_ENCODING = re.compile(rb"""(\s*<\?xml[^>]*?)\s+encoding\s*=\s*["']([\w.-]+)["']""")
_ROOT = re.compile(r"<(?:[\w.-]+:)?svg\b(?:[^>\"']|\"[^\"]*\"|'[^']*')*>")
_SIDE = re.compile(r"(\s(?:width|height)\s*=\s*)([\"'])\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z]+)\s*\2")


def is_drawing(file: BinaryIO) -> bool:
    """Return whether the file is XML, as no other image format begins with a tag. The file is left at its start."""
    head = file.read(1024)
    file.seek(0)
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"<")


def draw(path: str, limits: Limits, allow: Callable[[int], None]) -> Image.Image:
    """Render the SVG as RGB on white, 256 pixels wide unless it is more than eight times as tall.

    Args:
        path: The SVG file.
        limits: The decoding limits.
        allow: Called with the total number of pixels of the embedded bitmaps, before they are decoded.

    Raises:
        RefusedError: SVG is not accepted here, or the SVG refers to other files or embeds more than `max_pixels`.
        BrokenFileError: The SVG cannot be rendered.
    """
    if not limits.allow_svg:
        raise RefusedError("SVG drawings are accepted only by opt-ds serve --allow-svg")
    with open(path, "rb") as file:
        content = file.read()
    if what_it_is(content[:4096]) == "an HTML page":
        raise RefusedError("it is an HTML page, not an image")
    allow(0)
    pixels = sum(_embedded_pixels(content, _MOST_LEVELS))
    if pixels > limits.max_pixels:
        raise RefusedError(f"it embeds bitmaps of {pixels} pixels, more than {limits.max_pixels} (--max-pixels)")
    allow(pixels)
    # Without system fonts the result is the same on every machine (and nine times faster). The height is only an upper
    # bound, since the aspect ratio is kept.
    recoded = _in_utf8(content)
    text = _with_known_units(recoded or content) or (recoded.decode() if recoded is not None else None)
    source: dict[str, Any] = {"svg_path": path} if text is None else {"svg_string": text}
    try:
        drawn = resvg_py.svg_to_bytes(**source, width=SVG_SIDE, height=_TALLEST, skip_system_fonts=True, dpi=_DPI)
    except ValueError as error:
        raise BrokenFileError(_why_not_drawn(str(error))) from None
    return on_white(Image.open(io.BytesIO(bytes(drawn))))


def _why_not_drawn(message: str) -> str:
    if "invalid size" in message:
        return "the drawing's width or height is zero or negative"
    if "nodes limit" in message or "too many" in message.lower():
        return "the drawing is nested too deeply"
    return "the drawing is not valid SVG"


def _in_utf8(content: bytes) -> bytes | None:
    """Convert an SVG with another declared encoding to UTF-8, the only encoding that the renderer reads.

    Return None if no conversion is necessary or possible.
    """
    declared = _ENCODING.match(content[:200])
    try:
        if declared is None or codecs.lookup(declared[2].decode()).name in ("utf-8", "ascii"):
            return None
        rest = content[declared.end() :].decode(declared[2].decode())
    except (LookupError, UnicodeDecodeError):
        return None
    return declared[1] + rest.encode()


def _with_known_units(content: bytes) -> str | None:
    """Return the SVG with its width and height in units that the renderer supports; None if nothing has to change."""
    head = content[: 64 * 1024].decode("utf-8", errors="surrogateescape")
    root = _ROOT.search(head)
    if root is None:
        return None
    tag = _SIDE.sub(_in_known_unit, root[0])
    if tag == root[0]:
        return None
    changed = head[: root.start()] + tag + head[root.end() :]
    try:
        return (changed.encode("utf-8", errors="surrogateescape") + content[64 * 1024 :]).decode("utf-8")
    except UnicodeDecodeError:
        return None


def _in_known_unit(side: re.Match[str]) -> str:
    name, quote, number, unit = side.groups()
    if unit in _KNOWN:
        return side[0]
    if unit.lower() in _PERCENT:
        return f"{name}{quote}{number}%{quote}"
    pixels = _PIXELS_OF.get(unit.lower()) or _KNOWN.get(unit.lower())
    return side[0] if pixels is None else f"{name}{quote}{float(number) * pixels:.6g}{quote}"


def _embedded_pixels(content: bytes, levels: int) -> Iterator[int]:
    """Yield the pixels of each embedded bitmap. Raise RefusedError for a reference to anything outside the SVG.

    The renderer would read local files that an SVG names, and private files must not get into a store that way.
    """
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(content)):
            for name, value in element.attrib.items():
                if name.rsplit("}")[-1] != "href" or element.tag.endswith("}a"):
                    continue
                value = value.lstrip()
                if value.startswith("data:"):
                    yield from _pixels_of_url(value, levels)
                elif not value.startswith("#"):
                    raise RefusedError(f'the drawing refers to "{value[:80]}": other files are never fetched')
            element.clear()
    except ElementTree.ParseError as error:
        raise BrokenFileError(f"the drawing is not valid XML at line {error.position[0]}") from None


def _pixels_of_url(url: str, levels: int) -> Iterator[int]:
    header, _, data = url.partition(",")
    try:
        content = base64.b64decode(data) if header.rstrip().endswith("base64") else urllib.parse.unquote_to_bytes(data)
    except (binascii.Error, ValueError):
        return  # the renderer ignores it
    if content.startswith(b"\x1f\x8b"):
        raise RefusedError("the drawing embeds a compressed drawing")
    if content.lstrip().startswith((b"<", codecs.BOM_UTF8)):
        if not levels:
            raise RefusedError("the drawing embeds drawings in drawings, nested too deeply")
        yield from _embedded_pixels(content, levels - 1)
        return
    try:
        with open_bitmap(io.BytesIO(content)) as bitmap:
            yield bitmap.size[0] * bitmap.size[1]
    except Exception:  # not an image: the renderer ignores it
        return
