"""The decoder's process: what harms it is reported, and the next file is decoded as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from opt_ds.decoding.decoder import Decoder, DecodingError, EnvironmentFaultError, MissingFileError
from opt_ds.decoding.limits import Limits
from tests.decoding import hostile_files
from tests.decoding.wild_files import SVG, noise


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as decoder:
        yield decoder


@pytest.fixture
def still_works(decoder: Decoder, tmp_path: Path) -> Iterator[None]:
    """Check that after the test another image is decoded correctly."""
    yield
    noise().save(tmp_path / "after.png")
    assert decoder.image(tmp_path / "after.png").content.tobytes() == Image.open(tmp_path / "after.png").tobytes()


def children(of: int) -> list[int]:
    return [int(pid) for task in Path(f"/proc/{of}/task").iterdir() for pid in (task / "children").read_text().split()]


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("crash.heic", hostile_files.crashing_heic, r"the decoder crashed \(signal 11\)"),
        ("deep.svg", lambda path: hostile_files.nested_svg(path, 100_000), "crashed|nested|not valid"),
        ("bitmap.svg", lambda path: hostile_files.bitmap_svg(path, 11_000), "it embeds bitmaps of 121000000 pixels"),
        ("padded.png", hostile_files.padded_png, r"the file has 60.0 GiB, 1.6 GiB are allowed"),
        ("pipe.png", os.mkfifo, "not that of a regular file"),
        ("page.jpg", lambda path: path.write_text("<!DOCTYPE html><html><body><br></body>"), "it is an HTML page"),
        ("zip.png", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(90)), "it is a ZIP archive: accepted are JPEG"),
        ("a.jpg", lambda path: path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(90)), "M4A"),
    ],
)
@pytest.mark.usefixtures("still_works")
def test_a_hostile_image_costs_itself_alone(
    name: str, write: Callable[[Path], object], reason: str, decoder: Decoder, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(DecodingError, match=reason) as error:
        decoder.image(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("still_works")
def test_a_drawing_that_never_ends_is_ended(decoder: Decoder, tmp_path: Path) -> None:
    hostile_files.endless_svg(tmp_path / "endless.svg")
    with Decoder(Limits(cpu_s=1)) as hurried, pytest.raises(DecodingError, match=r"it took more than [15] s to decode"):
        hurried.image(tmp_path / "endless.svg")


def test_what_only_looks_odd_is_decoded(decoder: Decoder, tmp_path: Path) -> None:
    for name, write in (
        ("text.png", hostile_files.talkative_png),
        ("nested.svg", hostile_files.nested_svg),
        ("small.svg", lambda path: hostile_files.bitmap_svg(path, 100)),
        ("padded.png", lambda path: hostile_files.padded_png(path, 2**20)),
    ):
        write(tmp_path / name)
        assert decoder.image(tmp_path / name).content.mode == "RGB"


UNITS = ("", "px", "pt", "pc", "in", "cm", "mm", "Q", "q", "em", "ex", "rem", "ch", "vw", "%", "PT", "Mm")


@pytest.mark.parametrize("unit", UNITS)
def test_a_drawing_may_have_its_size_in_every_unit_of_css(unit: str, decoder: Decoder, tmp_path: Path) -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="30{0}" height="20{0}"><rect width="50%" height="50%" fill="red"/></svg>'
    (tmp_path / "a.svg").write_text(svg.format(unit))
    image = decoder.image(tmp_path / "a.svg").content
    assert image.width == 256 and 170 <= image.height <= 175
    assert image.getpixel((60, 60)) == (255, 0, 0)
    if unit not in ("%", "vw"):  # percentages without a reference: the drawing's content determines the size
        assert image.getpixel((200, 60)) == (255, 255, 255)


def test_arrays_are_sized_before_they_are_unpacked(decoder: Decoder, tmp_path: Path) -> None:
    hostile_files.npz_bomb(tmp_path / "bomb.npz", 2**27)
    hostile_files.lying_npz(tmp_path / "lies.npz")
    np.savez(tmp_path / "objects.npz", features=np.array([{}, {}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    for name, reason in (
        ("bomb.npz", "its arrays take 512 MiB, 256 are allowed"),
        ("lies.npz", r"declared as \[1000000000, 2048\], which the file does not hold"),
        ("objects.npz", "Python objects"),
        ("text.npz", "it is text: accepted are .npz"),
    ):
        with pytest.raises(DecodingError, match=reason):
            decoder.arrays(tmp_path / name)
    arrays = {
        "features": np.arange(6.0).reshape(2, 3), "conf": np.array([True, False]), "bbox": np.zeros((0, 4), "float16"),
        "image_w": np.int64(3),
    }  # fmt: skip
    notes = np.array({"objects": "that nobody reads"}, dtype=object)
    np.savez_compressed(tmp_path / "good.npz", info=notes, **arrays)
    read = decoder.arrays(tmp_path / "good.npz").content
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == np.asarray(array).dtype
        np.testing.assert_array_equal(read[name], array)


def test_memory_is_limited_by_what_a_file_announces(tmp_path: Path) -> None:
    limits = Limits(max_pixels=1000)
    noise(30, 30).save(tmp_path / "a.png")
    with Decoder(limits) as decoder:
        assert decoder.image(tmp_path / "a.png").content.size == (30, 30)
        noise(40, 30).save(tmp_path / "b.png")
        with pytest.raises(DecodingError, match="40 x 30 pixels are more than 1000"):
            decoder.image(tmp_path / "b.png")


def test_what_the_file_system_says_is_no_fault_of_the_file(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        decoder.image(tmp_path / "gone.png")
    with pytest.raises(EnvironmentFaultError, match=r"lost: cannot be read \(No such file or directory\)"):
        decoder.image(tmp_path / "lost" / "gone.png")
    (tmp_path / "io.png").symlink_to("/proc/self/mem")  # reading its start is an I/O error
    with pytest.raises(EnvironmentFaultError, match=r"io.png: cannot be read \(Input/output error\)"):
        decoder.image(tmp_path / "io.png")


@pytest.mark.usefixtures("still_works")
def test_a_process_that_is_killed_is_replaced(decoder: Decoder, tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    whole = decoder.image(tmp_path / "a.png").content.tobytes()
    for child in children(os.getpid()):
        if "decoder_process" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(child, signal.SIGKILL)
    assert decoder.image(tmp_path / "a.png").content.tobytes() == whole


def test_a_killed_parent_takes_a_computing_decoder_along(tmp_path: Path) -> None:
    """Although native code holds the interpreter's lock in it."""
    hostile_files.endless_svg(tmp_path / "endless.svg")
    program = (
        "import sys; from pathlib import Path; from opt_ds.decoding.decoder import Decoder; Decoder().image(Path(sys.argv[1]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, tmp_path / "endless.svg"])
    end = time.monotonic() + 60
    while not (found := children(parent.pid)) or _cpu_ticks(found[0]) < 100:
        assert time.monotonic() < end and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while Path(f"/proc/{found[0]}").exists() and "Z" not in Path(f"/proc/{found[0]}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < end, "the decoder outlived its parent"
        time.sleep(0.05)


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_nothing_that_libraries_print_is_seen(tmp_path: Path) -> None:
    """libmpg123 and Pillow print notes without the name of a file."""
    soundfile.write(tmp_path / "a.mp3", 0.3 * np.sin(np.arange(32000) / 9), 16000)
    (tmp_path / "a.mp3").write_bytes((tmp_path / "a.mp3").read_bytes()[:1700])
    program = (
        "import sys; from pathlib import Path; from opt_ds.decoding.decoder import Decoder, DecodingError\n"
        "try: Decoder().audio(Path(sys.argv[1]))\n"
        "except DecodingError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "a.mp3"], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("it is truncated: 0.")


def test_drawings_are_refused_where_they_are_not_allowed(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text(SVG.format('<circle r="4"/>'))
    assert decoder.image(tmp_path / "a.svg").content.width == 256
    with pytest.raises(DecodingError, match="--allow-svg"):
        decoder.image(tmp_path / "a.svg", Limits(allow_svg=False))


def test_a_drawing_of_another_encoding_is_drawn(decoder: Decoder, tmp_path: Path) -> None:
    start = '<?xml version="1.0" encoding="{}"?>'
    drawing = start + '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><title>Café</title>{}</svg>'
    shape = '<rect width="4" height="8" fill="red"/>'
    (tmp_path / "utf8.svg").write_text(drawing.format("UTF-8", shape), encoding="utf-8")
    expected = decoder.image(tmp_path / "utf8.svg").content.tobytes()
    for name in ("ISO-8859-1", "windows-1252"):
        (tmp_path / "a.svg").write_text(drawing.format(name, shape), encoding=name)
        assert decoder.image(tmp_path / "a.svg").content.tobytes() == expected
