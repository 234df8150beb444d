"""Reasons why a file was not used: what it is instead, truncated, damaged.

The messages of the libraries state neither.
"""

import re
from typing import Any

from opt_ds.decoding.file_kinds import PYAV, SVG, format_of_content, why_not_decodable

ACCEPTED = {
    "image": "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF, HEIC, JPEG 2000 and SVG images",
    "audio": "WAV, RF64, W64, AIFF, AU, CAF, FLAC, OGG and MP3 audio files",
    "arrays": ".npz, .npy, safetensors and HDF5 files of numbers",
}
_OWN = {"image": "image", "audio": "audio file", "arrays": "archive"}  # the last words of the names below
#: First bytes of further kinds of content. They are not in the list of formats, as they are never supplied as image
#: or audio.
_OTHER_CONTENT: tuple[tuple[bytes, str], ...] = (
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)
_SPOKEN_WITH_A_VOWEL = frozenset((
    "AVIF", "SVG", "icon", "OpenEXR", "RF64", "OGG", "MP3", "AIFF", "AU", "M4A", "AMR", "NIST", "AC-3", "XML", "HTML", "MPEG-4",
    "xz", "RAR",
))  # fmt: skip
_TRUNCATED = re.compile(
    r"truncat|unexpected end|end of file|not enough|premature|lost sync|incomplete|EOF", re.IGNORECASE
)


class RefusedError(ValueError):
    """A file that may be intact, but is too large or of a kind that is not accepted. The message is for the user."""


class BrokenFileError(ValueError):
    """A file whose content is inconsistent. The message is for the user."""


def what_it_is(head: bytes) -> str | None:
    """Return what a file is by its first bytes, such as "an HTML page"; None if they are unknown."""
    if not head:
        return "an empty file"
    found = format_of_content(head)
    if found is not None and found != SVG:
        return f"{_article(str(found))} {found}"
    for start, name in _OTHER_CONTENT:
        if head.startswith(start):
            return name
    if head[:1] in b"{[" and head.isascii():
        return "JSON"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return "XML"
    if not any(head):
        return "nothing but zeros"
    return "text" if head.isascii() and b"\0" not in head else None


def _article(name: str) -> str:
    return "an" if name.split()[0] in _SPOKEN_WITH_A_VOWEL else "a"


def unreadable(kind: str, head: bytes) -> BrokenFileError:
    """Return the error for a file that no decoder of its kind accepts: it is of another kind, or damaged."""
    if (advice := _advice(kind, head)) is not None:
        return BrokenFileError(advice)
    found = what_it_is(head)
    if found is None:
        return BrokenFileError(f"it is none of the {ACCEPTED[kind]}")
    if found.endswith(_OWN[kind]):
        return BrokenFileError(f"it is {found}, damaged or truncated")
    return BrokenFileError(f"it is {found}: accepted are {ACCEPTED[kind]}")


def _advice(kind: str, head: bytes) -> str | None:
    """Return advice for an image, audio file or video of a known format that has no decoder here; None for other files."""
    found = format_of_content(head)
    if found is None or not (found.kind == kind or (kind == "audio" and found.decoder == PYAV)):
        return None
    return why_not_decodable("", head)


def reason_of(error: Any, kind: str, head: bytes) -> str:
    """Return the reason to report for an exception of a decoder. `head` holds the first bytes of the file."""
    if isinstance(error, (RefusedError, BrokenFileError)):
        return " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if (advice := _advice(kind, head)) is not None:
        return advice
    found = what_it_is(head) or "of an accepted format"
    if _TRUNCATED.search(str(error)):
        return f"it is {found}, truncated or damaged"
    return f"it is {found}, damaged"
