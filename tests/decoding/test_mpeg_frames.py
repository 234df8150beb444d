"""Test MP3 files: without an index they are read to their end, whatever their first bit rate; truncated ones are refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from opt_ds.decoding.decoder import DecodingError
from opt_ds.decoding.mpeg_frames import count_frames, holds_another
from tests.decoded import audio_of

ID3 = b"ID3\x03\0\0\0\0\x02\0" + bytes(256)


def sound(seconds: float, rate_hz: int, channels: int) -> np.ndarray:
    """Silence first, noise later: of varying bit rate the first frame is then much smaller than the mean."""
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.2, (int(seconds * rate_hz), channels))
    samples[: len(samples) // 3] = 0
    return samples.astype("float32")


def without_index(path: Path, rate_hz: int, channels: int, mode: str, seconds: float = 3.0) -> bytes:
    """Return an MP3 of `seconds` whose first frame, which holds the number of frames, is removed."""
    soundfile.write(path, sound(seconds, rate_hz, channels), rate_hz, format="MP3", bitrate_mode=mode)
    content = path.read_bytes()
    place = max(content.find(b"Xing"), content.find(b"Info"))
    following = next(
        start for start in range(place, len(content))
        if content[start] == 0xFF and content[start : start + 2] == content[:2] and content[start + 2] & 0x0C == content[2] & 0x0C
    )  # fmt: skip
    return content[following:]


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize(("rate_hz", "channels"), [(16000, 1), (22050, 2), (44100, 2), (8000, 1), (48000, 1)])
def test_all_of_an_audio_file_without_an_index_is_read(tmp_path: Path, mode: str, rate_hz: int, channels: int) -> None:
    content = without_index(tmp_path / "whole.mp3", rate_hz, channels, mode)
    for name, stored in {"a.mp3": content, "b.mp3": ID3 + content, "c.mp3": content + b"TAG" + bytes(125)}.items():
        (tmp_path / name).write_bytes(stored)
        seconds = len(audio_of(tmp_path / name)) / 16000
        assert 2.95 < seconds < 3.2, f"{name}: {seconds:.2f} s, an encoder's padding is at most 0.2 s"


def test_an_audio_file_without_an_index_that_ends_within_a_frame_is_refused(tmp_path: Path) -> None:
    content = without_index(tmp_path / "whole.mp3", 16000, 1, "VARIABLE")
    (tmp_path / "cut.mp3").write_bytes(content[: len(content) // 2 + 7])
    with pytest.raises(DecodingError, match="truncated"):
        audio_of(tmp_path / "cut.mp3")


def test_files_with_an_index_or_other_content_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "whole.mp3"
    bare = without_index(path, 44100, 2, "VARIABLE")
    odd = tmp_path / "odd.mp3"
    broken = bare[:5000] + b"something else" * 50 + bare[5000:]
    for content in (path.read_bytes(), broken, b"\xff\xfb", b"ID3", struct.pack("4B", 255, 255, 255, 255)):
        odd.write_bytes(content)
        with odd.open("rb") as file:
            assert count_frames(file, len(content)) is None


@pytest.mark.parametrize("ending", ["mp3", "flac", "ogg"])
@pytest.mark.parametrize("between", [b"", ID3])
def test_audio_files_that_were_joined_are_refused(tmp_path: Path, ending: str, between: bytes) -> None:
    """A decoder reads the first one alone, without an error."""
    soundfile.write(tmp_path / f"a.{ending}", sound(1.3, 44100, 1), 44100)
    content = (tmp_path / f"a.{ending}").read_bytes()
    assert len(audio_of(tmp_path / f"a.{ending}")) > 16000
    if ending == "ogg" and between:
        return
    (tmp_path / f"joined.{ending}").write_bytes(content + between + content)
    with pytest.raises(DecodingError, match="several streams one after another"):
        audio_of(tmp_path / f"joined.{ending}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"MAC \x96\x0f" + bytes(400), "Monkey's Audio cannot be decoded here: convert it to WAV or FLAC"),
        (b"#!AMR\n" + bytes(300), "AMR cannot be decoded here"),
        (b"OggS\0\2" + bytes(20) + b"\1\x50Speex   " + bytes(72), "Speex in OGG, which cannot be decoded here"),
    ],
)
def test_formats_without_a_decoder_are_named_with_advice(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DecodingError, match=reason):
        audio_of(tmp_path / "a.wav")


def test_files_joined_behind_a_vbri_index_are_seen(tmp_path: Path) -> None:
    """VBRI is Fraunhofer's index: it lies 36 bytes into the first frame, whatever the channels."""
    bare = without_index(tmp_path / "whole.mp3", 44100, 2, "CONSTANT")
    header = bytes((*bare[:2], 0x90, bare[3]))  # 128 kbit/s at 44.1 kHz: 417 bytes
    with open(tmp_path / "whole.mp3", "wb+") as file:
        file.write(bare)
        frames = count_frames(file, len(bare)).samples // 1152
    fields = struct.pack(">4sHHHII", b"VBRI", 1, 0, 0, len(bare), frames)
    index = (header + bytes(32) + fields).ljust(417, b"\0")
    for content, joined in ((index + bare, False), (index + bare + index + bare, True), (ID3 + index + bare + ID3 + bare, True)):
        path = tmp_path / "a.mp3"
        path.write_bytes(content)
        with open(path, "rb") as file:
            assert holds_another(file, len(content)) == joined
