"""WebDataset tars: what becomes of img2dataset's layout and of audio, and what is left out and why."""

import gzip
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from opt_ds.decoding.tar_members import content_blocks, find_member, member_reference
from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import report_path
from opt_ds.ingest.importers.shards import expand_braces, find_shards
from opt_ds.ingest.importers.webdataset import import_webdataset
from opt_ds.ingest.manifest import ManifestLine, read_manifest
from tests.ingest.importers.manifests import left_out
from tests.ingest.importers.tars import JPEG, add_member, write_tar


def content_of(manifest: Path, name: str | None) -> bytes:
    reference = member_reference(manifest.parent / (name or ""))
    assert reference is not None, name
    with open(reference.tar, "rb") as file:
        return b"".join(content_blocks(file, find_member(file, reference)))


def lines_of(manifest: Path) -> dict[str, ManifestLine]:
    read = read_manifest(manifest, allow_outside=True)
    assert read.rejected == []
    for line in read.lines:
        for name in line.files().values():
            content_of(manifest, name)
    return {line.id: line for line in read.lines}


def report_of(manifest: Path) -> dict[str, Any]:
    return json.loads(report_path(manifest).read_text())


def downloaded(key: str, caption: str | None = "A cat.") -> list[tuple[str, bytes]]:
    """Return the three members that img2dataset writes for an image."""
    meta = {"caption": caption, "url": f"http://a.b/{key}", "key": key, "status": "success", "error_message": None,
            "width": 256, "height": 256, "original_width": 640, "original_height": 480, "exif": "{}",
            "sha256": "0" * 64}  # fmt: skip
    texts = {"txt": caption or "", "json": json.dumps(meta, indent=4)}
    return [(f"{key}.jpg", JPEG + key.encode()), *((f"{key}.{ending}", text.encode()) for ending, text in texts.items())]


def test_img2datasets_shards_are_read_in_place(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("valid", 2)):
        for shard in (first, first + 1):
            keys = [f"{shard:05d}{number:04d}" for number in (0, 7)]
            members = [member for key in keys for member in downloaded(key, f"Caption of {key}")]
            write_tar(tmp_path / "cc" / split / f"{shard:05d}.tar", members)
    (tmp_path / "cc" / "train" / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "cc" / "train" / "00000_stats.json").write_text("{}")
    manifest = tmp_path / "m" / "manifest.jsonl"
    import_webdataset([f"train={tmp_path}/cc/train/{{00000..00001}}.tar", f"valid={tmp_path}/cc/valid/*.tar"], manifest)
    samples = lines_of(manifest)
    assert sorted(samples) == [f"{split}/{shard:05d}/{shard:05d}{number:04d}"
                               for split, shard in (("train", 0), ("train", 1), ("valid", 2), ("valid", 3))
                               for number in (0, 7)]  # fmt: skip
    line = samples["valid/00002/000020007"]
    assert (line.text, line.split, line.group) == ("Caption of 000020007", "valid", line.id)
    assert line.image is not None and line.image.startswith("../cc/valid/00002.tar#000020007.jpg@")
    assert content_of(manifest, line.image) == JPEG + b"000020007"
    (unused,) = report_of(manifest)["unused"]
    assert unused["what"] == "fields" and {"url", "sha256", "caption"} <= set(unused["names"])
    assert report_of(manifest)["notes"] == []
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["manifest.jsonl", "manifest.report.json"]
    before = manifest.read_bytes()
    import_webdataset([f"train={tmp_path}/cc/train", f"valid={tmp_path}/cc/valid"], manifest)
    assert manifest.read_bytes() == before, "a folder means the tars in it"


def test_audio_with_texts_of_json_and_several_captions(tmp_path: Path) -> None:
    members = [
        ("a/1.flac", b"fLaC1"), ("a/1.json", json.dumps({"text": ["Rain.", "Rain falls."], "tag": ["rain", "water"]}).encode()),
        ("a/2.wav", b"RIFF\0\0\0\0WAVE"), ("a/2.json", json.dumps({"caption": None, "text": "Wind.", "tag": [3]}).encode()),
        ("a/3.MP3", b"ID3"), ("a/3.transcript", b"\xef\xbb\xbfhello\n"),
        ("a/4.ogg", b"OggS"), ("a/4.png", b"\x89PNG\r\n\x1a\n"), ("a/4.seg.png", b"\x89PNG\r\n\x1a\n"), ("a/4.cls", b"3"),
        ("a/e\u0301.wav", b"RIFF\0\0\0\0WAVE"), ("a/\u00e9.txt", b"decomposed"),
        ("a/5.ape", b"MAC \x96\x0f"), ("a/5.txt", b"x"), ("a/6.txt", b"NUL\0"),
    ]  # fmt: skip
    write_tar(tmp_path / "x.tar", members, tarfile.PAX_FORMAT)
    manifest = tmp_path / "manifest.jsonl"
    import_webdataset([str(tmp_path / "x.tar")], manifest, members=["labels=json:tag"])
    samples = lines_of(manifest)
    assert {id: line.text for id, line in samples.items()} == {
        "x/a/1#0": "Rain.", "x/a/1#1": "Rain falls.", "x/a/2": "Wind.", "x/a/3": "hello", "x/a/4": None,
        "x/a/\u00e9": "decomposed",
    }  # fmt: skip
    assert samples["x/a/1#0"].audio == samples["x/a/1#1"].audio
    assert samples["x/a/1#0"].group == samples["x/a/1#1"].group == "x/a/1"
    assert (samples["x/a/1#0"].labels, samples["x/a/2"].labels) == (("rain", "water"), ("3",))
    assert content_of(manifest, samples["x/a/4"].image) == b"\x89PNG\r\n\x1a\n" and ".seg" not in (samples["x/a/4"].image or "")
    assert left_out(manifest) == {
        "x/a/5": "Monkey's Audio cannot be decoded here: a/5.ape: convert it to WAV or FLAC",
        "x/a/6": "a NUL character is in the text: a/6.txt",
    }
    report = report_of(manifest)
    assert report["unused"][0]["names"] == [".cls (1)", ".seg.png (1)"]
    assert report["notes"][0].startswith("samples with audio and text: 4, image and audio: 1")
    import_webdataset([str(tmp_path / "x.tar")], manifest, members=["image=seg.png", "text=cls", "audio=ogg"])
    (line,) = lines_of(manifest).values()
    assert line.text == "3" and line.image is not None and "a/4.seg.png@" in line.image
    for given, message in (
        ("pictures=png", "write FIELD=ENDING"), ("image", "write FIELD=ENDING"), ("text=json", "name a field of a .json"),
        ("image=json:url", "name a field of a .json"), ("text=txt:caption", "name a field of a .json"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            import_webdataset([str(tmp_path / "x.tar")], manifest, members=[given])


def test_keys_with_dots_end_at_the_first_dot_or_at_the_last(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [(f"v1.{number}.{ending}", JPEG) for number in "ab" for ending in ("jpg", "txt")])
    manifest = tmp_path / "m.jsonl"
    with pytest.raises(UserError, match=r'"x/v1": several image members: v1.a.jpg and v1.b.jpg: .* or use --last-dot'):
        import_webdataset([str(tmp_path / "x.tar")], manifest)
    write_tar(tmp_path / "x.tar", [member for key in ("v1.a", "v1.b") for member in downloaded(key, key)])
    import_webdataset([str(tmp_path / "x.tar")], manifest, last_dot=True)
    assert {id: line.text for id, line in lines_of(manifest).items()} == {"x/v1.a": "v1.a", "x/v1.b": "v1.b"}


def test_members_that_are_no_plain_files_cost_their_sample(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        add_member(tar, "folder", type=tarfile.DIRTYPE)
        for key in ("good", "twice", "twice", "linked", "hard", "piped", "/etc/absolute", "../outside", "late", "nothing"):
            if key not in ("linked", "hard", "piped", "nothing"):
                add_member(tar, f"{key}.jpg", JPEG + key.encode())
            if key != "late":
                add_member(tar, f"{key}.{'cls' if key == 'nothing' else 'txt'}", b"a text")
        add_member(tar, "linked.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add_member(tar, "hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg")
        add_member(tar, "piped.jpg", type=tarfile.FIFOTYPE)
        add_member(tar, "sparse.jpg", b"1\n0\n1\n", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        add_member(tar, "not-json.jpg", JPEG)
        add_member(tar, "not-json.json", b"{")
        add_member(tar, "odd.jpg", JPEG)
        add_member(tar, "odd.json", b'{"caption": {"en": "x"}}')
        add_member(tar, "latin.txt", "é".encode("latin-1"))
        add_member(tar, "empty.txt", b" \n")
        add_member(tar, "readme", b"x")
        add_member(tar, "._good.jpg", b"x")
        add_member(tar, "late.txt", b"late text")
    manifest = tmp_path / "m.jsonl"
    import_webdataset([str(path)], manifest)
    assert {id: line.text for id, line in lines_of(manifest).items()} == {"x/good": "a text", "x/late": "late text"}
    assert left_out(manifest) == {
        "x/twice": "two members have one name: twice.jpg",
        "x/linked": "a member is a link: linked.jpg",
        "x/hard": "a member is a link: hard.jpg",
        "x/piped": "a member is a special file: piped.jpg",
        "x/sparse": "a member is a sparse file: sparse.jpg",
        "x//etc/absolute": "the name of a member is not usable: /etc/absolute.jpg",
        "x/../outside": "the name of a member is not usable: ../outside.jpg",
        "x/nothing": "no image, audio or text member: it has cls",
        "x/not-json": "not JSON: not-json.json: it is truncated",
        "x/odd": "not as published: x/odd: the text is neither a text nor a list of texts",
        "x/latin": "the text is not UTF-8: latin.txt",
        "x/empty": "the text is empty",
    }
    report = report_of(manifest)
    assert any(each["names"] == ["readme", "._good.jpg"] for each in report["unused"])
    assert any(note.startswith("tars whose members of a sample are not adjacent") for note in report["notes"])


def test_truncated_damaged_and_joined_tars_are_reported_and_the_samples_before_are_used(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [member for key in ("1", "2", "3") for member in downloaded(key)]).read_bytes()
    bounds = [index for index in range(0, len(whole), 512) if whole[index : index + 1] in b"123" and whole[index]]
    for name, content, kept in (
        ("in-a-content", whole[: bounds[-1] + 600], {"1", "2"}),
        ("in-a-header", whole[: bounds[-2] + 100], {"1", "2"}),
        ("between-members", whole[: bounds[7]], {"1", "2"}),
        ("between-samples", whole[: bounds[6]], {"1"}),
        ("a-flipped-bit", whole[: bounds[4]] + b"\xb2" + whole[bounds[4] + 1 :], {"1"}),
        ("joined", whole + whole, {"1", "2", "3"}),
    ):
        path, manifest = tmp_path / f"{name}.tar", tmp_path / "m.jsonl"
        path.write_bytes(content)
        import_webdataset([str(path)], manifest)
        assert set(lines_of(manifest)) == {f"{name}/{key}" for key in kept}, name
        assert left_out(manifest)[name].startswith(f"the tar is truncated or damaged: {name}.tar: "), name
        assert len(left_out(manifest)) == (1 if name == "joined" else 2), "its last sample may be incomplete"
    (tmp_path / "garbage.tar").write_bytes(b"not a tar" * 99)
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    import_webdataset([str(tmp_path / f"{name}.tar") for name in ("whole", "garbage", "empty")], manifest)
    assert sorted(left_out(manifest)) == ["empty", "garbage"], "each shard without a sample is reported"


def test_shards_that_cannot_be_read_in_place_are_refused_in_one_line(tmp_path: Path) -> None:
    content = write_tar(tmp_path / "00000.tar", downloaded("1")).read_bytes()
    (tmp_path / "00001.tar.gz").write_bytes(gzip.compress(content))
    (tmp_path / "00002.tar").write_bytes(b"BZh9" + content)
    (tmp_path / "shard").write_bytes(content)
    (tmp_path / "picture.tar").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    (tmp_path / "none").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("00000.tar", "00001.tar.gz"):
        (tmp_path / "mixed" / name).write_bytes((tmp_path / name).read_bytes())
    for given, message in (
        (["00001.tar.gz"], r"00001.tar.gz: compressed, .*: decompress it"),
        (["00002.tar"], "00002.tar: compressed"),
        (["shard"], "must end with .tar: rename it"),
        (["picture.tar"], "PNG image, not a tar"),
        (["{00000..00009}.tar"], r"00001.tar: no such file, as 8 of the 10 that .* names"),
        (["*.tra"], r"\*.tra: no such file"),
        (["mixed"], r"mixed/00001.tar.gz: compressed"),
        (["none"], r"no file there is called \*.tar"),
        (["00000.tar", "train=./00000.tar"], "it is named twice"),
        (["{0..99999999}.tar"], "stand for more than 1,000,000 names"),
    ):
        arguments = [each.replace("=", f"={tmp_path}/") if "=" in each else f"{tmp_path}/{each}" for each in given]
        with pytest.raises(UserError, match=message) as error:
            import_webdataset(arguments, tmp_path / "m.jsonl")
        assert "\n" not in str(error.value)
    for given in ("https://a.b/{0..9}.tar", "s3://a/b.tar", "train=gs://a/b.tar", "pipe:curl http://a.b/c.tar"):
        with pytest.raises(UserError, match="nothing is downloaded here"):
            import_webdataset([given], tmp_path / "m.jsonl")
    assert not (tmp_path / "m.jsonl").exists()


def test_braces_are_those_of_a_shell(tmp_path: Path) -> None:
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{0..4..2}{x,y}") == ["0x", "0y", "2x", "2y", "4x", "4y"]
    assert expand_braces("{3..1}") == ["3", "2", "1"]
    assert expand_braces("{a}-{b,c{1,2}}") == ["{a}-b", "{a}-c1", "{a}-c2"]
    (tmp_path / "{1..2}.tar").write_bytes(b"")
    assert [shard.name for shard in find_shards([str(tmp_path / "{1..2}.tar")], (".tar",))] == ["{1..2}"]


def test_seeded_corruptions_never_pair_the_wrong_members(tmp_path: Path) -> None:
    """Blocks are changed, removed, doubled, swapped; whatever comes out pairs the image and the text of one key."""
    keys = [f"{random.Random(number).randrange(10**11, 10**12)}" for number in range(6)]
    members = [(f"{key}.{ending}", JPEG + key.encode() if ending == "jpg" else f"of {key}".encode())
               for key in keys for ending in ("jpg", "txt")]  # fmt: skip
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    blocks = [whole[start : start + 512] for start in range(0, len(whole), 512)]
    came = 0
    for seed in range(60):
        chance = random.Random(seed)
        changed, place = list(blocks), chance.randrange(24)
        kind = seed % 5
        if kind == 0:  # only headers: a changed content is no one's fault here
            header = bytearray(changed[place - place % 2])
            header[chance.randrange(512)] ^= 1 << chance.randrange(8)
            changed[place - place % 2] = bytes(header)
        elif kind == 1:
            del changed[place]
        elif kind == 2:
            changed.insert(chance.randrange(24), changed[place])
        elif kind == 3:
            other = chance.randrange(24)
            changed[place], changed[other] = changed[other], changed[place]
        content = b"".join(changed)
        (tmp_path / "x.tar").write_bytes(content[: chance.randrange(len(content))] if kind == 4 else content)
        manifest = tmp_path / "m.jsonl"
        manifest.unlink(missing_ok=True)
        try:
            import_webdataset([str(tmp_path / "x.tar")], manifest)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        for id, line in lines_of(manifest).items():
            key = id.removeprefix("x/")
            came += 1
            if line.image is not None and line.text is not None and kind not in (2, 3):
                assert content_of(manifest, line.image) == JPEG + key.encode() and line.text == f"of {key}", seed
        lost = 6 - len(lines_of(manifest))
        assert not lost or left_out(manifest), f"{seed}: {lost} samples are lost without a report"
    assert came > 100
