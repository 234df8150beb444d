"""Why a file was not used, in our words: what it is instead, cut off, damaged. Libraries' own messages name neither."""

import re
from typing import Any

from opt_ds.prepare.file_kinds import format_of_content, why_not_decodable

ACCEPTED = {
    "image": "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF, HEIC, JPEG 2000 and SVG pictures",
    "audio": "WAV, RF64, W64, AIFF, AU, CAF, FLAC, OGG and MP3 recordings",
    "arrays": ".npz files of numbers",
}
_OWN = {"image": "picture", "audio": "recording", "arrays": "archive"}  # how the names below end
_HTML = re.compile(rb"\s*(<!--.*?-->\s*)*(<!doctype\s+html|<html|<head|<body)", re.IGNORECASE | re.DOTALL)
#: What a file is, by its first bytes (at an offset).
_SIGNATURES: list[tuple[int, bytes, str]] = [
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (0, b"GIF8", "a GIF picture"),
    (8, b"WEBP", "a WebP picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (0, b"BM", "a BMP picture"),
    (0, b"8BPS", "a Photoshop file"),
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftyphei", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIF picture"),
    (4, b"ftypM4A", "an MPEG-4 (M4A) recording"),
    (4, b"ftypqt", "a QuickTime video"),
    (4, b"ftyp", "an MPEG-4 (MP4) file"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (8, b"WAVE", "a WAV recording"),
    (8, b"AVI ", "an AVI video"),
    (0, b"riff", "a W64 recording"),
    (8, b"AIF", "an AIFF recording"),
    (0, b".snd", "an AU recording"),
    (0, b"caff", "a CAF recording"),
    (0, b"fLaC", "a FLAC recording"),
    (0, b"OggS", "an OGG recording"),
    (0, b"ID3", "an MP3 recording"),
    (0, b"#!AMR", "an AMR recording"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a Windows Media file"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript program"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"\xfd7zXZ", "an xz file"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x80\x02", "a pickle"),
    (0, b"\x80\x04", "a pickle"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
]  # fmt: skip
_CUT = re.compile(r"truncat|unexpected end|end of file|not enough|premature|lost sync|incomplete|EOF", re.IGNORECASE)


class RefusedError(ValueError):
    """A file that may be whole, but is larger than allowed or of a kind that is not accepted. The message is for the user."""


class BrokenFileError(ValueError):
    """A file whose content contradicts itself. The message is for the user."""


def what_it_is(head: bytes) -> str | None:
    """Return what a file is by its first bytes, such as "an HTML page"; None if nothing is known about them."""
    if not head:
        return "an empty file"
    if _HTML.match(head.removeprefix(b"\xef\xbb\xbf")):
        return "an HTML page"
    for offset, signature, name in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return name
    if head[:1] in b"{[" and head.isascii():
        return "JSON"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return "XML"
    if not any(head):
        return "nothing but zeros"
    return "text" if head.isascii() and b"\0" not in head else None


def unreadable(kind: str, head: bytes) -> BrokenFileError:
    """Return the error for a file that no decoder of its kind takes: another kind of file, or a damaged one of this kind."""
    if (advice := _advice(kind, head)) is not None:
        return BrokenFileError(advice)
    found = what_it_is(head)
    if found is None:
        return BrokenFileError(f"it is none of the {ACCEPTED[kind]}")
    if found.endswith(_OWN[kind]):
        return BrokenFileError(f"it is {found}, damaged or cut off")
    return BrokenFileError(f"it is {found}: accepted are {ACCEPTED[kind]}")


def _advice(kind: str, head: bytes) -> str | None:
    """Return what to do with a picture or recording of a format that is known and has no decoder here."""
    found = format_of_content(head)
    return why_not_decodable("", head) if found is not None and found.kind == kind else None


def reason_of(error: Any, kind: str, head: bytes) -> str:
    """Return the reason to report for a decoder's exception. `head`: the file's first bytes."""
    if isinstance(error, (RefusedError, BrokenFileError)):
        return " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if (advice := _advice(kind, head)) is not None:
        return advice
    found = what_it_is(head) or "of an accepted format"
    if _CUT.search(str(error)):
        return f"it is {found}, cut off or damaged"
    return f"it is {found}, damaged"
