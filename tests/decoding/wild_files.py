"""Files as they are found in the wild: each one good or bad in one way, with the reason that must be reported."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 8 8">{}</svg>'
HEIC = Path(__file__).parent / "files" / "turned.heic"  # as a phone saves it: 64 x 32 pixels, left red, right blue, turned
_random = np.random.default_rng(7)


@dataclass(frozen=True)
class Wild:
    """A file: its name, what writes it, and what its skipped sample's reason must contain (None: it is good)."""

    name: str
    write: Callable[[Path], object]
    reason: str | None = None

    @property
    def kind(self) -> str:
        return "audio" if self.name.endswith((".wav", ".ogg", ".flac", ".mp3")) else "image"


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(_random.integers(0, 256, (height, width, 3), "uint8"))


def wave(seconds: float, rate_hz: int, channels: int = 1) -> np.ndarray:
    time = np.arange(int(seconds * rate_hz)) / rate_hz
    return np.stack([0.4 * np.sin(2 * np.pi * 300 * (1 + channel) * time) for channel in range(channels)], 1)


def sound(seconds: float, rate_hz: int, subtype: str, channels: int = 1) -> Callable[[Path], object]:
    return lambda path: soundfile.write(path, wave(seconds, rate_hz, channels), rate_hz, subtype=subtype)


def truncated(name: str, count: int, **options: object) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        whole = path.with_name(f"whole-{path.name}")
        noise(200, 200).save(whole, name, **options)
        path.write_bytes(whole.read_bytes()[:count])
        whole.unlink()

    return write


def huge_png(path: Path) -> None:
    """Write a PNG of 20,000 x 20,000: 50 kB of zeros that would become 1.2 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), bytes(1 + 20_000 // 8)
    data = b"".join(packer.compress(rows) for _ in range(20_000)) + packer.flush()
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise().save(path, exif=exif)


def grey16(path: Path) -> None:
    Image.fromarray(_random.integers(0, 65536, (20, 30)).astype("uint16")).save(path)


def float32(path: Path) -> None:
    Image.fromarray(_random.random((20, 30), "float32")).save(path)


def lying_wav(path: Path) -> None:
    """A header that promises 2 GB."""
    sound(0.3, 16000, "PCM_16")(path)
    data = bytearray(path.read_bytes())
    data[40:44] = struct.pack("<I", 2**31)
    path.write_bytes(data)


WILD = [
    Wild("plain.jpg", lambda path: noise().save(path)),
    Wild("one.png", lambda path: Image.new("RGB", (1, 1), "red").save(path)),
    Wild("thin.png", lambda path: noise(3, 3000).save(path)),
    Wild("cmyk.jpg", lambda path: noise().convert("CMYK").save(path)),
    Wild("grey16.png", grey16),
    Wild("rgba.png", lambda path: noise().convert("RGBA").save(path)),
    Wild("palette.png", lambda path: noise().convert("P").save(path, transparency=3)),
    Wild("bilevel.png", lambda path: noise().convert("1").save(path)),
    Wild("animated.gif", animated),
    Wild("animated.webp", animated),
    Wild("rotated.jpg", rotated),
    Wild("phone.heic", lambda path: path.write_bytes(HEIC.read_bytes())),
    Wild("lab.tiff", lambda path: noise().convert("LAB").save(path)),
    Wild("named.jpg", lambda path: noise().save(path, "PNG")),
    Wild("link.svg", lambda path: path.write_text(SVG.format('<a href="http://a.b"><rect width="4" height="4"/></a>'))),
    Wild("tall.svg", lambda path: path.write_text(SVG.replace("0 0 8 8", "0 0 1 90000").format(""))),
    Wild("cut.jpg", truncated("JPEG", 900), "image file is broken: cut.jpg"),
    Wild("cut.png", truncated("PNG", 900), "image file is broken: cut.png"),
    Wild("cut.webp", truncated("WEBP", 300), "image file is broken: cut.webp"),
    Wild("cut.heic", lambda path: path.write_bytes(HEIC.read_bytes()[:300]), "image file is broken: cut.heic"),
    Wild("huge.png", huge_png, "20000 x 20000 pixels are more than 100000000"),
    Wild("float.tiff", float32, "no fixed range"),
    Wild("empty.jpg", lambda path: path.write_bytes(b""), "image file is broken"),
    Wild("text.png", lambda path: path.write_text("not an image"), "image file is broken"),
    Wild("script.ps.png", lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "PostScript"),
    Wild("file.svg", lambda path: path.write_text(SVG.format('<image href="/etc/secret.png"/>')), "never fetched"),
    Wild("web.svg", lambda path: path.write_text(SVG.format('<use xlink:href="http://a.b/c.svg#d"/>')), "never fetched"),
    Wild("broken.svg", lambda path: path.write_text("<svg><rect></svg>"), "image file is broken"),
    Wild("entity.svg", lambda path: path.write_text('<!DOCTYPE s [<!ENTITY x SYSTEM "/etc/passwd">]><svg>&x;</svg>'), "broken"),
    Wild("low.wav", sound(0.4, 8000, "PCM_U8")),
    Wild("high.wav", sound(0.4, 192000, "PCM_24")),
    Wild("odd.wav", sound(0.4, 44057, "PCM_16")),
    Wild("float.wav", sound(0.4, 22050, "FLOAT")),
    Wild("double.wav", sound(0.4, 48000, "DOUBLE")),
    Wild("int32.wav", sound(0.4, 16000, "PCM_32")),
    Wild("alaw.wav", sound(0.4, 8000, "ALAW")),
    Wild("six.wav", sound(0.4, 48000, "PCM_16", channels=6)),
    Wild("short.wav", sound(0.001, 16000, "PCM_16")),
    Wild("music.ogg", sound(0.4, 44100, "VORBIS")),
    Wild("none.wav", sound(0, 16000, "PCM_16"), "the audio has no samples"),
    Wild("text.wav", lambda path: path.write_text("not an audio file at all"), "audio file is broken"),
    Wild("cut.flac", lambda path: path.write_bytes(b"fLaC" + bytes(30)), "audio file is broken"),
    Wild("nan.wav", lambda path: soundfile.write(path, np.full(999, np.nan), 16000, subtype="FLOAT"), "NaN"),
    Wild("slow.wav", lambda path: soundfile.write(path, np.zeros(99), 3), "its sample rate of 3 Hz is outside"),
    Wild("long.wav", lambda path: soundfile.write(path, np.zeros(3_700_000), 1000, subtype="PCM_U8"), "more than 3600"),
]  # fmt: skip
