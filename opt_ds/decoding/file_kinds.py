"""The only list of file formats: their endings, their kinds, whether they can be decoded here, and their first bytes.

Every list of endings or decoders elsewhere is derived from `FORMATS`. A name only suggests a kind. `format_of_content`
uses the first bytes of a file. Content takes precedence wherever a file is opened.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

Kind = Literal["image", "audio", "text", "regions", "table", "archive", "video", "document"]
HEAD_BYTES = 1024  # number of bytes that format_of_content requires
_TO_IMAGE = "convert it to PNG or JPEG"
_TO_WAV = "convert it to WAV or FLAC"
_TO_SOUND = "extract its sound as WAV or FLAC"
_RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf")
_VIDEOS = (".avi", ".mkv", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv")
_CLUTTER_NAMES = ("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r")
_CLUTTER_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information")
_HTML_TAGS = (b"<html", b"<!doctype html", b"<head", b"<body")
_NOUNS = {"image": "image", "audio": "audio file", "archive": "archive", "video": "video", "document": "document"}
_XML_STARTS = (b"<?xml", b"<svg", b"<!doctype svg", b"<!--")


@dataclass(frozen=True)
class FileFormat:
    """A file format. `decoder` is its name in Pillow or libsndfile, or `PYAV`; None if it cannot be decoded here.

    `advice` states how to make a file of a format without a decoder usable. PyAV may not be installed.
    """

    name: str
    kind: Kind
    endings: tuple[str, ...]
    decoder: str | None = None
    advice: str = ""

    def __str__(self) -> str:
        """Return the format with its kind, such as "WAV audio file"."""
        noun = _NOUNS.get(self.kind, "file")
        return self.name if self.name.endswith(("page", noun)) else f"{self.name} {noun}"


#: The decoder of formats whose sound PyAV reads (containers.py), the package of the extra `media`.
PYAV = "PyAV"
SVG = FileFormat("SVG", "image", (".svg",), "SVG")
TABLE = FileFormat("table", "table", (".csv", ".tsv", ".tab", ".parquet", ".arrow"), "table")
_TO_FILE = "download the file itself, not a page about it"
HTML = FileFormat("HTML page", "document", (".html", ".htm", ".xhtml"), advice=_TO_FILE)
_MPEG4 = FileFormat("MPEG-4", "video", (".mp4", ".m4v", ".mov", ".3gp"), PYAV, advice=_TO_SOUND)
_M4A = FileFormat("M4A", "audio", (".m4a", ".m4b", ".m4r", ".aac", ".alac"), PYAV, advice=_TO_WAV)

FORMATS: tuple[FileFormat, ...] = (
    FileFormat("JPEG", "image", (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp"), "JPEG"),
    FileFormat("PNG", "image", (".png", ".apng"), "PNG"),
    FileFormat("WebP", "image", (".webp",), "WEBP"),
    FileFormat("GIF", "image", (".gif",), "GIF"),
    FileFormat("BMP", "image", (".bmp", ".dib"), "BMP"),
    FileFormat("TIFF", "image", (".tif", ".tiff"), "TIFF"),
    FileFormat("PPM", "image", (".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    FileFormat("AVIF", "image", (".avif", ".avifs"), "AVIF"),
    FileFormat("HEIF", "image", (".heif", ".heifs", ".heic", ".heics", ".hif"), "HEIF"),
    FileFormat("JPEG 2000", "image", (".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"), "JPEG2000"),
    SVG,
    FileFormat("compressed SVG", "image", (".svgz",), advice="decompress it to .svg"),
    FileFormat("JPEG XL", "image", (".jxl",), advice=_TO_IMAGE),
    FileFormat("Photoshop", "image", (".psd", ".psb"), advice=_TO_IMAGE),
    FileFormat("icon", "image", (".ico", ".icns"), advice=_TO_IMAGE),
    FileFormat("Targa", "image", (".tga",), advice=_TO_IMAGE),
    FileFormat("OpenEXR or HDR", "image", (".exr", ".hdr", ".pfm"), advice=_TO_IMAGE),
    FileFormat("PostScript", "image", (".eps", ".ps"), advice=_TO_IMAGE),
    FileFormat("camera raw", "image", _RAW, advice=_TO_IMAGE),
    FileFormat("WAV", "audio", (".wav", ".wave"), "WAV"),
    FileFormat("RF64", "audio", (".rf64",), "RF64"),
    FileFormat("Wave64", "audio", (".w64",), "W64"),
    FileFormat("FLAC", "audio", (".flac",), "FLAC"),
    FileFormat("OGG", "audio", (".ogg", ".oga", ".opus"), "OGG"),
    FileFormat("MP3", "audio", (".mp3", ".mp2", ".mpga"), "MP3"),
    FileFormat("AIFF", "audio", (".aiff", ".aif", ".aifc"), "AIFF"),
    FileFormat("AU", "audio", (".au", ".snd"), "AU"),
    FileFormat("CAF", "audio", (".caf",), "CAF"),
    _M4A,
    FileFormat("WMA", "audio", (".wma", ".asf"), PYAV, advice=_TO_WAV),
    FileFormat("WebM", "audio", (".weba", ".webm", ".mka"), PYAV, advice=_TO_WAV),
    FileFormat("AMR", "audio", (".amr", ".3ga"), advice=_TO_WAV),
    FileFormat("Speex", "audio", (".spx",), advice=_TO_WAV),
    FileFormat("Monkey's Audio", "audio", (".ape",), advice=_TO_WAV),
    FileFormat("WavPack", "audio", (".wv",), advice=_TO_WAV),
    FileFormat("NIST Sphere", "audio", (".sph", ".nist"), advice=_TO_WAV),
    FileFormat("AC-3", "audio", (".ac3",), PYAV, advice=_TO_WAV),
    FileFormat("DTS", "audio", (".dts",), advice=_TO_WAV),
    FileFormat("MIDI", "audio", (".mid", ".midi"), advice=_TO_WAV),
    FileFormat("text", "text", (".txt",), "text"),
    FileFormat("NumPy regions", "regions", (".npz",), "npz"),
    FileFormat("JSON", "table", (".json", ".jsonl", ".ndjson"), "json"),
    TABLE,
    FileFormat("XML", "table", (".xml",), "xml"),
    HTML,
    FileFormat("PDF", "document", (".pdf",), advice="export its pages as PNG"),
    FileFormat("Markdown", "document", (".md", ".rst"), advice="rename it to .txt if it is a sample's text"),
    FileFormat("Word", "document", (".doc", ".docx", ".odt", ".rtf"), advice="save it as a .txt in UTF-8"),
    _MPEG4,
    FileFormat("video", "video", _VIDEOS, PYAV, advice=_TO_SOUND),
    FileFormat("ZIP", "archive", (".zip",), advice="unpack it"),
    FileFormat("gzip", "archive", (".gz", ".tgz"), advice="unpack it"),
    FileFormat("bzip2", "archive", (".bz2",), advice="unpack it"),
    FileFormat("xz", "archive", (".xz",), advice="unpack it"),
    FileFormat("7-Zip", "archive", (".7z",), advice="unpack it"),
    FileFormat("RAR", "archive", (".rar",), advice="unpack it"),
    FileFormat("tar", "archive", (".tar",), advice="opt-ds import webdataset reads the files in it"),
)  # fmt: skip

_BY_ENDING = {ending: each for each in FORMATS for ending in each.endings}
_BY_NAME = {each.name: each for each in FORMATS}
#: Endings of the files that downloaders and annotators write next to an image or audio file, under its name.
SIDECAR_ENDINGS: tuple[str, ...] = (".json", ".txt", ".xml", ".csv", ".tsv", ".jsonl")

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG\r\n\x1a\n", "PNG"), (0, b"GIF87a", "GIF"), (0, b"GIF89a", "GIF"),
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"II+\0", "TIFF"), (0, b"MM\0+", "TIFF"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (0, b"\xff\x4f\xff\x51", "JPEG 2000"), (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"), (0, b"8BPS", "Photoshop"), (0, b"\0\0\x01\0", "icon"),
    (0, b"icns", "icon"), (0, b"\x76\x2f\x31\x01", "OpenEXR or HDR"), (0, b"#?RADIANCE", "OpenEXR or HDR"),
    (0, b"%!PS", "PostScript"), (0, b"fLaC", "FLAC"), (0, b"OggS", "OGG"), (0, b"ID3", "MP3"), (0, b".snd", "AU"),
    (0, b"caff", "CAF"), (0, b"RF64", "RF64"), (0, b"riff\x2e\x91\xcf\x11", "Wave64"), (0, b"#!AMR", "AMR"),
    (0, b"MAC ", "Monkey's Audio"), (0, b"wvpk", "WavPack"), (0, b"NIST_1A", "NIST Sphere"), (0, b"\x0b\x77", "AC-3"),
    (0, b"MThd", "MIDI"), (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA"), (0, b"\x1a\x45\xdf\xa3", "WebM"),
    (0, b"FLV\1", "video"), (0, b"\0\0\1\xba", "video"),
    (0, b"%PDF-", "PDF"), (0, b"PK\x03\x04", "ZIP"), (0, b"\x1f\x8b", "gzip"), (0, b"BZh", "bzip2"),
    (0, b"\xfd7zXZ\0", "xz"), (0, b"7z\xbc\xaf\x27\x1c", "7-Zip"), (0, b"Rar!", "RAR"), (257, b"ustar", "tar"),
)  # fmt: skip
_CONTAINERS = (
    (b"\x1a\x45\xdf\xa3", "matroska"), (b"\x0b\x77", "ac3"), (b"\x30\x26\xb2\x75", "asf"), (b"RIFF", "avi"), (b"FLV\1", "flv"),
    (b"\0\0\1\xba", "mpeg"),
)  # fmt: skip
_RIFF = {b"WAVE": "WAV", b"WEBP": "WebP", b"AVI ": "video"}
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"M4A ": "M4A",
    b"M4B ": "M4A",
    b"crx ": "camera raw",
    **dict.fromkeys(_HEIF_BRANDS, "HEIF"),
}


def is_decodable(found: FileFormat) -> bool:
    """Return whether files of a format can be decoded in this installation."""
    return found.decoder is not None and (found.decoder != PYAV or _has_pyav())


@functools.cache
def _has_pyav() -> bool:
    return importlib.util.find_spec("av") is not None


def container_of_content(head: bytes) -> str | None:
    """Return FFmpeg's name of the format of a file that PyAV decodes, by its first bytes; None for other files."""
    found = format_of_content(head)
    if found is None or found.decoder != PYAV:
        return None
    if head[4:8] == b"ftyp":
        return "mov"
    return next((name for start, name in _CONTAINERS if head.startswith(start)), "aac")


def format_of_name(name: str | os.PathLike[str]) -> FileFormat | None:
    """Return the format that the ending of a file suggests; None if the ending is missing or unknown."""
    return _BY_ENDING.get(os.path.splitext(os.fspath(name))[1].lower())


def kind_of_name(name: str | os.PathLike[str]) -> Kind | None:
    """Return the kind that the ending of a file suggests; None if the ending is missing or unknown."""
    found = format_of_name(name)
    return None if found is None else found.kind


def format_of_content(head: bytes) -> FileFormat | None:
    """Return the format of a file by its first bytes (`HEAD_BYTES` are enough); None if they are inconclusive."""
    return _format_of_tag(head) or _BY_NAME.get(_name_of_magic(head) or "")


def kind_of_content(head: bytes) -> Kind | None:
    """Return the kind of a file by its first bytes; None if they are inconclusive, as for plain text."""
    found = format_of_content(head)
    return None if found is None else found.kind


def endings_of(*kinds: Kind, decodable: bool = False) -> tuple[str, ...]:
    """Return the endings of some kinds of files. With `decodable`, only those of formats that can be decoded here."""
    return tuple(
        ending
        for each in FORMATS
        if each.kind in kinds and (is_decodable(each) or not decodable)
        for ending in each.endings
    )


def why_not_decodable(name: str | os.PathLike[str], head: bytes = b"") -> str | None:
    """Return why a file cannot be used and how to fix that; None if its format can be decoded here or is unknown.

    The first bytes decide if they are conclusive, otherwise the ending does.
    """
    found = format_of_content(head) or format_of_name(name)
    if found is None or is_decodable(found):
        return None
    if found.decoder == PYAV:
        return f"{found.name} needs PyAV: pip install 'opt_ds[media]', or {found.advice}"
    return f"{found.name} cannot be decoded here: {found.advice}"


def is_clutter(path: str | os.PathLike[str]) -> bool:
    """Return whether a relative path is clutter: hidden files, `__MACOSX/`, `Thumbs.db` and the like."""
    *folders, name = os.fspath(path).replace(os.sep, "/").split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in (*folders, name))
    return hidden or name.lower() in _CLUTTER_NAMES or any(part.lower() in _CLUTTER_FOLDERS for part in folders)


def _format_of_tag(head: bytes) -> FileFormat | None:
    """Return SVG or HTML by the first known tag. A byte order mark, an XML declaration or comments may precede it."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:HEAD_BYTES].lower()
    if not text.startswith(b"<"):
        return None
    places = [place for tag in _HTML_TAGS if (place := text.find(tag)) >= 0]
    drawing = text.find(b"<svg")
    if places and (drawing < 0 or min(places) < drawing):
        return HTML
    return SVG if drawing >= 0 or text.startswith(_XML_STARTS) else None


def _name_of_magic(head: bytes) -> str | None:
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12])
    if head[:4] == b"FORM":
        return "AIFF" if head[8:12] in (b"AIFF", b"AIFC") else None
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "MPEG-4")
    for place, start, name in _MAGIC:
        if head[place : place + len(start)] == start:
            return name
    if head[:2] == b"BM" and len(head) > 14 and head[6:10] == bytes(4):
        return "BMP"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:  # sync word of a frame, followed by its layer
        return {0: "M4A", 2: "MP3", 4: "MP3"}.get(head[1] & 0x06)  # 0 is AAC; 6 could be a UTF-16 byte order mark
    return None
