"""Files made to harm their decoder, and files that only seem harmful."""

import base64
import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image, PngImagePlugin

from tests.decoding.wild_files import HEIC, SVG, noise


def crashing_heic(path: Path) -> None:
    """pi_heif follows a pointer of this file into nowhere: signal 11."""
    path.write_bytes(HEIC.read_bytes().replace(b"Exif", b"E\x80\0\0"))


def nested_svg(path: Path, levels: int = 400) -> None:
    path.write_text(SVG.format("<g>" * levels + '<circle r="4"/>' + "</g>" * levels))


def endless_svg(path: Path) -> None:
    """A renderer would compute for hours, holding the interpreter's lock."""
    path.write_text(
        SVG.format('<filter id="f"><feTurbulence numOctaves="100000000"/></filter><rect width="8" height="8" filter="url(#f)"/>')
    )


def bitmap_svg(path: Path, side: int = 30_000) -> None:
    """Write a bitmap of 30,000 x 30,000 in a drawing of 200 kB."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    path.write_text(SVG.format(f'<image width="8" height="8" href="{url}"/>'))


def padded_png(path: Path, zeros: int = 60 * 2**30) -> None:
    """Write a valid image followed by 60 GiB of zeros, which take no space on the disk."""
    noise().save(path, "PNG")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + zeros)


def talkative_png(path: Path) -> None:
    """Write a valid image with 3 MB of text, as editors do. Pillow alone refuses it."""
    text = PngImagePlugin.PngInfo()
    text.add_text("history", "edited " * 400_000, zip=True)
    noise().save(path, "PNG", pnginfo=text)


def npz_bomb(path: Path, values: int = 1_600_000_000) -> None:
    """6 GB of zeros in 6 MB."""
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("features.npy", "w", force_zip64=True) as member:
        npy.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (values // 2048, 2048)})
        zeros = bytes(2**24)
        for _ in range(values * 4 // len(zeros)):
            member.write(zeros)


def lying_npz(path: Path) -> None:
    """A header that promises more than the file holds."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("features.npy", "w") as member:
        npy.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 2048)})
        member.write(np.zeros(10, "float32").tobytes())
