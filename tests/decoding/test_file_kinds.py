"""The list of file formats: endings and first bytes agree with the decoders that are installed."""

import io
from pathlib import Path

import numpy as np
import pi_heif
import pytest
import soundfile
from PIL import Image

from opt_ds.decoding.file_kinds import (
    FORMATS,
    PYAV,
    endings_of,
    format_of_content,
    is_clutter,
    kind_of_content,
    kind_of_name,
    why_not_decodable,
)

pi_heif.register_heif_opener()
Image.init()
#: Kind -> names, in Pillow or libsndfile, of the formats that can be decoded.
DECODERS = {
    kind: [each.decoder for each in FORMATS if each.kind == kind and each.decoder not in (None, PYAV)]
    for kind in ("image", "audio")
}
WRITTEN = [name for name in DECODERS["image"] if name in Image.SAVE]


def test_no_ending_belongs_to_two_formats() -> None:
    endings = [ending for each in FORMATS for ending in each.endings]
    assert len(endings) == len(set(endings))
    assert all(ending.startswith(".") and ending == ending.lower() for ending in endings)
    assert all(each.advice for each in FORMATS if each.decoder in (None, PYAV))


@pytest.mark.parametrize("name", WRITTEN)
def test_images_are_told_by_their_first_bytes(name: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(file, name)
    found = format_of_content(file.getvalue()[:1024])
    assert found is not None and found.decoder == name and found.kind == "image"


@pytest.mark.parametrize("name", DECODERS["audio"])
def test_audio_files_are_told_by_their_first_bytes(name: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a", np.zeros(4000, "float32"), 16000, format=name)
    found = format_of_content((tmp_path / "a").read_bytes()[:1024])
    assert found is not None and found.decoder == name and found.kind == "audio"


def test_every_ending_that_pillow_knows_of_a_decoded_format_is_listed() -> None:
    known = {ending for ending, name in Image.registered_extensions().items() if name in DECODERS["image"]}
    assert known - {".pfm"} <= set(endings_of("image", decodable=True))  # PFM holds floats without a range


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"<html><body><svg/></body></html>", "document"),
        (b"\xef\xbb\xbf <!DOCTYPE html>", "document"),
        (b'<?xml version="1.0"?><!-- drawn --><svg xmlns="x"/>', "image"),
        (b"\0\0\0\x20ftypM4A ", "audio"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"\0\0\0\x20ftypheic", "image"),
        (b"\xff\xfb\x90\0", "audio"),
        (b"\xff\xf1\x50\x80", "audio"),
        (b"PK\x03\x04", "archive"),
        ("text".encode("utf-16"), None),
        (b"A cat on a mat", None),
        (b"", None),
    ],
)
def test_other_content(head: bytes, kind: str | None) -> None:
    assert kind_of_content(head) == kind


def test_what_cannot_be_decoded_says_what_to_do() -> None:
    assert why_not_decodable("b.APE") == "Monkey's Audio cannot be decoded here: convert it to WAV or FLAC"
    assert why_not_decodable("b.ape", b"RIFF\0\0\0\0WAVEfmt ") is None, "content decides"
    assert why_not_decodable("b.jpg", b"<html>") == (
        "HTML page cannot be decoded here: download the file itself, not a page about it"
    )
    assert why_not_decodable("b") is None
    assert {kind_of_name(f"a{ending}") for ending in (".jfif", ".JPE", ".heif", ".avif")} == {"image"}


@pytest.mark.parametrize("path", [".DS_Store", "a/._x.jpg", "__MACOSX/a.jpg", "Thumbs.db", ".git/a.png"])
def test_clutter(path: str) -> None:
    assert is_clutter(path)
    assert not is_clutter("a.b/c.d.jpg") and not is_clutter("../x.jpg")
