"""The sound of M4A, WebM, AC-3 and videos: like the samples that were encoded, and damaged files are named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from opt_ds.decoding.decoder import DecodingError
from opt_ds.decoding.file_kinds import container_of_content, kind_of_content, why_not_decodable
from tests.decoded import audio_of

RATE_HZ = 16_000
#: Ending -> FFmpeg's format, codec, rate, sample format.
FORMATS = {
    "m4a": ("ipod", "aac", 44_100, "fltp"),
    "aac": ("adts", "aac", 16_000, "fltp"),
    "webm": ("webm", "libopus", 48_000, "flt"),
    "mka": ("matroska", "libopus", 48_000, "flt"),
    "ac3": ("ac3", "ac3", 48_000, "fltp"),
    "wma": ("asf", "wmav2", 44_100, "fltp"),
    "mp4": ("mp4", "aac", 48_000, "fltp"),
    "mov": ("mov", "aac", 44_100, "fltp"),
    "avi": ("avi", "mp3", 44_100, "fltp"),
    "flv": ("flv", "aac", 44_100, "fltp"),
    "mpg": ("mpeg", "mp2", 48_000, "s16"),
}


def chirp(seconds: float = 2.0) -> np.ndarray:
    """A tone that rises from 200 Hz, so that a shift or another speed is seen; float32 [n] at 16 kHz."""
    time = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    return (0.4 * np.sin(2 * np.pi * (200 * time + 150 * time**2))).astype("float32")


def add_sound(container: Any, codec: str, rate_hz: int, sample_format: str, channels: np.ndarray) -> Callable[[], None]:
    """Add a sound track; the returned function encodes it. `channels` is float32 [1 or 2, n] at 16 kHz."""
    layout = ("mono", "stereo")[len(channels) - 1]
    stream = container.add_stream(codec, rate=rate_hz)
    stream.layout, stream.format, stream.bit_rate = layout, sample_format, 128_000

    def encode() -> None:
        frame = av.AudioFrame.from_ndarray(channels, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = RATE_HZ, 0
        resampler = av.AudioResampler(sample_format, layout, rate_hz, frame_size=stream.codec_context.frame_size or 1024)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))

    return encode


def add_pictures(container: Any, count: int = 20) -> Callable[[], None]:
    stream = container.add_stream("mpeg4", rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"

    def encode() -> None:
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * number, "uint8"), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    return encode


def save(path: Path, *tracks: np.ndarray, pictures: bool = False, **options: str) -> Path:
    """Write a file of `FORMATS` with these sound tracks."""
    name, codec, rate_hz, sample_format = FORMATS[path.suffix[1:]]
    with av.open(str(path), "w", format=name, options=options) as container:
        parts = [add_pictures(container)] if pictures else []
        parts += [add_sound(container, codec, rate_hz, sample_format, channels) for channels in tracks]
        for encode in parts:
            encode()
    return path


def likeness(found: np.ndarray, expected: np.ndarray) -> float:
    """The correlation at the best shift of at most 0.15 s: encoders put some samples before the first one, or drop some."""
    margin = 2400
    middle = expected[margin:-margin]
    padded = np.pad(found, (0, 2 * margin))
    shift = int(np.correlate(padded[: len(expected)], middle, "valid").argmax())
    return float(np.corrcoef(padded[shift : shift + len(middle)], middle)[0, 1])


@pytest.mark.parametrize("ending", FORMATS)
def test_the_sound_is_that_which_was_encoded(ending: str, tmp_path: Path) -> None:
    expected = chirp()
    path = save(tmp_path / f"a.{ending}", expected[None])
    assert kind_of_content(path.read_bytes()[:1024]) in ("audio", "video")
    assert why_not_decodable(path) is None
    found = audio_of(path)
    assert abs(len(found) - len(expected)) < 0.2 * RATE_HZ
    assert likeness(found, expected) > 0.98
    assert np.array_equal(found, audio_of(path)), "decoding is reproducible"


def test_channels_are_averaged(tmp_path: Path) -> None:
    both = np.stack([chirp(), np.zeros(2 * RATE_HZ, "float32")])
    found = audio_of(save(tmp_path / "a.m4a", both))
    assert likeness(found, chirp()) > 0.98
    assert abs(np.abs(found[4000:20000]).max() - 0.2) < 0.03, "half of 0.4"


def test_the_sound_of_a_video_is_read_and_its_pictures_are_not(tmp_path: Path) -> None:
    found = audio_of(save(tmp_path / "a.mp4", chirp()[None], pictures=True))
    assert likeness(found, chirp()) > 0.98
    found = audio_of(save(tmp_path / "a.avi", chirp(1.0)[None], pictures=True))
    assert abs(len(found) - RATE_HZ) < 0.2 * RATE_HZ, "shorter than the pictures, and not truncated"


@pytest.mark.parametrize(
    ("name", "tracks", "pictures", "reason"),
    [
        ("silent.mp4", 0, True, "it has no sound"),
        ("two.mka", 2, False, "it has 2 sound tracks, of which one would be read: extract that as WAV or FLAC"),
    ],
)
def test_videos_without_one_sound_track_are_refused(name: str, tracks: int, pictures: bool, reason: str, tmp_path: Path) -> None:
    path = save(tmp_path / name, *[chirp(0.5)[None]] * tracks, pictures=pictures)
    with pytest.raises(DecodingError, match=reason):
        audio_of(path)


@pytest.mark.parametrize("ending", ["m4a", "webm", "wma", "avi", "flv"])
def test_truncated_files_are_named(ending: str, tmp_path: Path) -> None:
    options = {"movflags": "faststart"} if ending == "m4a" else {}
    content = save(tmp_path / f"a.{ending}", chirp()[None], **options).read_bytes()
    (tmp_path / f"cut.{ending}").write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(DecodingError, match=r"truncated|damaged"):
        audio_of(tmp_path / f"cut.{ending}")


def test_damaged_and_hostile_files_cost_a_reason(tmp_path: Path) -> None:
    content = save(tmp_path / "a.m4a", chirp()[None]).read_bytes()
    (tmp_path / "index.m4a").write_bytes(content[: len(content) // 2])  # the index is at the end
    (tmp_path / "head.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(400))
    (tmp_path / "head.webm").write_bytes(b"\x1a\x45\xdf\xa3" + bytes(400))
    (tmp_path / "head.ac3").write_bytes(b"\x0b\x77" + bytes(400))
    for name in ("index.m4a", "head.m4a", "head.webm", "head.ac3"):
        with pytest.raises(DecodingError, match=r"^(it is an? (M4A|WebM|AC-3) audio file, |it has no sound)"):
            audio_of(tmp_path / name)
    (tmp_path / "list.m4a").write_bytes(b"#EXTM3U\n#EXTINF:1,\n" + str(tmp_path / "a.m4a").encode())
    assert container_of_content((tmp_path / "list.m4a").read_bytes()) is None, "FFmpeg never sees a playlist"
    with pytest.raises(DecodingError, match="it is text: accepted are WAV"):
        audio_of(tmp_path / "list.m4a")


def test_the_limit_of_seconds_holds_with_and_without_a_stated_length(tmp_path: Path) -> None:
    for ending in ("m4a", "aac"):
        path = save(tmp_path / f"a.{ending}", chirp(3.0)[None])
        with pytest.raises(DecodingError, match=r"s are more than 1 \(--max-seconds\)"):
            audio_of(path, max_seconds=1.0)
