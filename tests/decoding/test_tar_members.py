"""Members of tars are read in place like files, and only if the tar has them where the reference states."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from opt_ds.decoding.decoder import Decoder, DecodingError, EnvironmentFaultError, MissingFileError
from opt_ds.decoding.limits import Limits
from opt_ds.decoding.reasons import BrokenFileError
from opt_ds.decoding.tar_members import (
    JoinedTarError,
    TarMember,
    content_blocks,
    find_member,
    iterate_members,
    member_reference,
    plain_name,
    shown_name,
)
from tests.ingest.importers.tars import add_member, write_tar

LONG = "folder/" * 30 + "näme"  # neither a ustar name nor its prefix can hold it
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def members_of(path: Path) -> list[TarMember]:
    with open(path, "rb") as file:
        return list(iterate_members(file))


def content_of(reference: str) -> bytes:
    parsed = member_reference(reference)
    assert parsed is not None and str(parsed) == reference
    with open(parsed.tar, "rb") as file:
        return b"".join(content_blocks(file, find_member(file, parsed)))


@pytest.mark.parametrize("format", FORMATS)
def test_every_header_format_is_read_as_tarfile_reads_it(tmp_path: Path, format: str) -> None:
    names = ["a.jpg", "./b.jpg", "folder/c.jpg", *([] if format == "ustar" else [f"{LONG}.jpg"])]
    path = write_tar(tmp_path / "x.tar", [(name, name.encode() * 100) for name in names], FORMATS[format])
    with tarfile.open(path, "a", format=FORMATS[format]) as tar:
        add_member(tar, "folder", type=tarfile.DIRTYPE)
        add_member(tar, "link.jpg", type=tarfile.SYMTYPE, linkname="a.jpg")
        add_member(tar, "pipe.jpg", type=tarfile.FIFOTYPE)
        add_member(tar, "last.txt", b"end")
    with tarfile.open(path) as tar:
        known = [(info.name, info.size, info.offset, info.offset_data) for info in tar]
    found = members_of(path)
    assert [(each.name.rstrip("/"), each.size, each.offset, each.content_offset) for each in found] == known
    assert [each.kind for each in found[-4:]] == ["folder", "link", "special file", "file"]
    for member, name in zip(found, names, strict=False):
        assert content_of(f"{path}#{plain_name(member.name)}@{member.offset}+{member.size}") == name.encode() * 100


def test_members_decode_to_the_bytes_of_loose_files(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (20, 30, 3), "uint8")).save(tmp_path / "a.png")
    (tmp_path / "b.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle r="4" fill="red"/></svg>')
    soundfile.write(tmp_path / "c.flac", 0.3 * random.standard_normal(2000), 16000)
    soundfile.write(tmp_path / "d.mp3", 0.3 * random.standard_normal(16000), 16000)
    np.savez(tmp_path / "e.npz", features=random.standard_normal((3, 4)))
    loose = sorted(tmp_path.iterdir())
    tar = write_tar(tmp_path / "x.tar", [(path.name, path.read_bytes()) for path in loose], tarfile.PAX_FORMAT, uname="ü")
    with Decoder() as decoder:
        for path, member in zip(loose, members_of(tar), strict=True):
            by_ending = {".npz": decoder.arrays, ".flac": decoder.audio, ".mp3": decoder.audio}
            read = by_ending.get(path.suffix, decoder.image)
            inside = read(Path(f"{tar}#{member.name}@{member.offset}+{member.size}"))
            outside = read(path)
            assert inside.digest == outside.digest
            if path.suffix == ".npz":
                assert np.array_equal(inside.content["features"], outside.content["features"])
            else:
                assert np.array_equal(np.asarray(inside.content), np.asarray(outside.content)), path.name


def test_a_reference_that_the_tar_does_not_have_is_a_fault_of_the_file(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a.png", b"x" * 600), ("b.png", b"y" * 600)])
    with Decoder() as decoder:

        def reason(reference: str) -> str:
            with pytest.raises(DecodingError) as caught:
                decoder.image(tmp_path / reference)
            return str(caught.value)

        elsewhere = "x.tar does not have it at byte {}: import the tar again if it has changed"
        assert reason("x.tar#a.png@1536+600") == elsewhere.format(1536), "another member is there"
        assert reason("x.tar#a.png@0+599") == elsewhere.format(0), "it has another size"
        assert reason("x.tar#a.png@512+600") == elsewhere.format(512), "a content is no header"
        assert reason(f"x.tar#a.png@{10**18 - 1}+600") == elsewhere.format(10**18 - 1)
        assert reason("x.tar#../a.png@0+600") == elsewhere.format(0), "a name is compared, never followed"
        assert reason(f"x.tar#a.png@0+{10**18 - 1}").startswith("the file has "), "its size is checked before it is read"
        assert reason("x.tar#a.png@0+600") == "it is text: accepted are " + reason("x.tar#b.png@1536+600").split("are ")[1]
        with pytest.raises(DecodingError, match=r"x.tar is truncated"):
            tar.write_bytes(tar.read_bytes()[:2200])
            decoder.image(tmp_path / "x.tar#b.png@1536+600", Limits())
        with pytest.raises(MissingFileError, match=r"gone.tar#a.png is missing"):
            decoder.image(tmp_path / "gone.tar#a.png@0+600")
        with pytest.raises(EnvironmentFaultError, match="lost: cannot be read"):
            decoder.image(tmp_path / "lost" / "x.tar#a.png@0+600")
    assert shown_name("/data/x.tar#folder/a.png@0+600") == "x.tar#folder/a.png"
    assert member_reference("x.tar#" * 10**6 + "@") is None, "and at once"
    for ordinary in ("x.tar", "x.tar#a.png", "a.png@0+600", "x.tar#a.png@-1+2", "x.tar#@0+1", "x.tar#a@0+"):
        assert member_reference(ordinary) is None


def changed(path: Path, place: int, content: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[place : place + len(content)] = content
    path.write_bytes(data)
    return path


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def test_damage_is_an_error_after_the_members_before_it(tmp_path: Path) -> None:
    """`tarfile` ends silently at most of these."""
    whole = write_tar(tmp_path / "whole.tar", [(f"{name}.jpg", b"x" * 600) for name in "abc"]).read_bytes()
    huge = with_checksum(whole[:124] + b"%011o\0" % 8**10 + whole[136:512])
    negative = with_checksum(whole[:124] + b"\xff" * 12 + whole[136:512])
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = b"L", 2**30
    global_header = tarfile.TarInfo.create_pax_global_header({"path": "other.jpg"})
    pax = tarfile.TarInfo.create_pax_global_header({"size": "x"}).replace(b"g", b"x", 1)
    cases = [
        (whole[:3072], 2, "it has no end marker"),
        (whole[:3300], 2, "it ends inside of a header"),
        (whole[:3700], 2, "it ends inside of the member c.jpg of 600 bytes"),
        (whole[:1536] + b"\1" + whole[1537:], 1, "no member begins at byte 1536"),
        (whole[:1536] + whole[2048:], 1, "no member begins at byte"),
        (huge + whole[512:], 0, "it ends inside of the member a.jpg of 1073741824 bytes"),
        (negative + whole[512:], 0, "negative size"),
        (long_name.tobuf(tarfile.GNU_FORMAT) + whole, 0, "1073741824 bytes, 1048576 are allowed"),
        (global_header + whole, 0, "a global header changes"),
        (with_checksum(pax[:512]) + pax[512:] + whole, 0, "a damaged extended header"),
        (whole + whole, 3, "more follows after its end marker"),
        (b"garbage" * 200, 0, "no member begins at byte 0"),
    ]
    for content, count, reason in cases:
        path = tmp_path / "x.tar"
        path.write_bytes(content)
        found = []
        with open(path, "rb") as file, pytest.raises(BrokenFileError, match=reason) as caught:
            for member in iterate_members(file):
                found.append(member)
        assert len(found) == count, reason
        assert isinstance(caught.value, JoinedTarError) == ("more follows" in reason)
    many = io.BytesIO()
    with tarfile.open(fileobj=many, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            add_member(tar, "é" * (number + 1), pax_headers={"comment": "x" * 300})
    (tmp_path / "x.tar").write_bytes(many.getvalue())
    assert [each.name for each in members_of(tmp_path / "x.tar")] == ["é", "éé", "ééé"]


def test_sparse_members_are_told_apart(tmp_path: Path) -> None:
    """One as GNU tar writes it, whose map of six parts continues in a block of its own; one as a pax header describes it."""
    old = bytearray(tarfile.TarInfo("old.jpg").tobuf(tarfile.GNU_FORMAT))
    old[124:136], old[156:157], old[482] = b"%011o\0" % 6, b"S", 1
    whole = write_tar(tmp_path / "x.tar", [("after.jpg", b"whole")]).read_bytes()
    (tmp_path / "x.tar").write_bytes(with_checksum(bytes(old)) + b"map".ljust(512, b"\0") + b"sparse".ljust(512, b"\0") + whole)
    assert [(each.name, each.kind, each.content_offset) for each in members_of(tmp_path / "x.tar")] == [
        ("old.jpg", "sparse file", 1024), ("after.jpg", "file", 2048),
    ]  # fmt: skip
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add_member(tar, "a.jpg", b"1\n0\n512\n", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        add_member(tar, "b.jpg", b"whole")
    assert [each.kind for each in members_of(tmp_path / "x.tar")] == ["sparse file", "file"]


def test_names_that_leave_the_tar_or_break_a_reference_are_not_plain() -> None:
    assert plain_name("././a/b.jpg") == "a/b.jpg"
    leaving = ("/a.jpg", "../a.jpg", "a/../b.jpg", "a//b.jpg", "a/./b.jpg", "")
    for name in (*leaving, "a\nb.jpg", "x.tar#a@0+1", "a\udcff.jpg", "n" * 1001):
        assert plain_name(name) is None, name
    for name in ("a#b@1+2.jpg", "👨‍👩‍👧.jpg", "全\u3000角.jpg"):
        assert plain_name(name) == name
