"""Test manifests: errors name their line; shards keep samples of one image together; splits keep groups together."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ds.errors import UserError
from opt_ds.ingest.manifest import Manifest, groups_across_splits, read_manifest


def write(path: Path, lines: list[dict | str]) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the manifest has no lines"),
        (["{broken"], "line 1: not JSON"),
        (["[1]"], "line 1: not a JSON object"),
        (
            [{"id": "a", "text": "x"}, {"id": "b", "txet": "x"}],
            r'line 2: unknown field "txet" \(did you mean "text"\?\)',
        ),
        ([{"id": "a", "text": "x", "further": {}}], 'line 1: unknown field "further"'),
        ([{"text": "x"}], "line 1: field id: it is missing"),
        ([{"id": 7.5, "text": "x"}], "line 1: field id: give a name in quotes"),
        ([{"id": "a"}], "line 1: none of image, text, audio"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], 'line 2: id "a" is also on line 1'),
        ([{"id": "a", "text": "x", "split": "train"}, {"id": "b", "text": "y"}], 'id "b" has no "split"'),
        ([{"id": "a", "text": "x", "labels": "cat"}], r'field labels: give a list of names, such as \["cat"\]'),
        ([{"id": str(n), "text": "x", "split": f"fold{n}"} for n in range(300)], "300 splits, .*: a store has at most 256"),
    ],
)
def test_a_bad_manifest_gives_one_line_that_names_the_place(tmp_path: Path, lines: list, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_manifest(write(tmp_path / "m.jsonl", lines), strict=True)
    assert "\n" not in str(error.value)


def test_a_manifest_that_is_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such manifest"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="begins as UTF-16 text, but is truncated"):
        read_manifest(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"image,text\na.jpg,a cat\n", "a table, not a manifest: opt-ds import table .*t.csv --output"),
        ("t.TSV", b"image\ttext\na.jpg\ta cat\n", "a table, not a manifest"),
        ("t.csv.gz", gzip.compress(b"image,text\na.jpg,a cat\n", mtime=0), "a table, not a manifest"),
        ("t.parquet", b"PAR1\x15\x04\x15", "a table, not a manifest"),
        ("t.jsonl", b"PAR1\x15\x04\x15", "a table, not a manifest"),
        ("a.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF", "format JPEG, not a manifest"),
        ("a.jsonl", b"\x89PNG\r\n\x1a\n", "format PNG, not a manifest"),
        ("a.flac", b"fLaC\0\0", "format FLAC, not a manifest"),
        ("a.mp4", b"\0\0\0\x20ftypisom", "format MPEG-4, not a manifest"),
        ("t.zip", b"PK\x03\x04", "archive, not a text file"),
    ],
)
def test_a_file_that_is_no_manifest_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_manifest(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["m.csv", "m.jpg", "m.csv.gz", "m"])
def test_a_manifest_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    content = b'\n{"id": "a", "text": "x"}\n'
    (tmp_path / name).write_bytes(content)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(content))
    assert len(read_manifest(tmp_path / name).lines) == 1


@pytest.mark.parametrize(
    ("word", "field"),
    [("caption", "text"), ("Sentence", "text"), ("transcription", "text"), ("path", "image"), ("file_name", "image"),
     ("wav", "audio"), ("recording", "audio"), ("label", "labels"), ("class", "labels"), ("imgae", "image")],
)  # fmt: skip
def test_names_of_other_collections_suggest_the_field(tmp_path: Path, word: str, field: str) -> None:
    with pytest.raises(UserError, match=rf'unknown field "{word}" \(did you mean "{field}"\?\)'):
        read_manifest(write(tmp_path / "m.jsonl", [{"id": "a", word: "x"}]))


def test_byte_order_marks_and_blank_lines_are_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "a", "text": "x"}\n\n{"id": "b", "text": "y"}\n')
    assert [line.id for line in read_manifest(tmp_path / "m.jsonl").lines] == ["a", "b"]


def test_values_that_can_mean_one_thing_only_are_taken(tmp_path: Path) -> None:
    lines = [
        {"id": 7, "text": "x", "labels": None, "image": None, "group": 3, "split": "train"},
        {"id": "b", "text": "y", "labels": [1, "cat"], "split": "train"},
    ]
    first, second = read_manifest(write(tmp_path / "m.jsonl", lines)).lines
    assert (first.id, first.labels, first.group, second.labels) == ("7", (), "3", ("1", "cat"))
    lines[1]["id"] = "7"
    (rejected,) = read_manifest(write(tmp_path / "m.jsonl", lines)).rejected
    assert 'id "7" is also on line 1' in rejected.reason


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("labels", "cat", 'give a list of names, such as ["cat"]'),
        ("labels", [["cat"]], 'give a list of names, such as ["cat"]'),
        ("labels", [True], 'give a list of names, such as ["cat"]'),
        ("labels", {"cat": 1}, 'give a list of names, such as ["cat"]'),
        ("text", 7, "give a text in quotes"),
        ("image", ["a.jpg"], "give a file's name in quotes"),
        ("group", True, "give a name in quotes"),
        ("id", [], "give a name in quotes"),
    ],
)
def test_other_values_are_refused_in_plain_words(tmp_path: Path, field: str, value: object, message: str) -> None:
    lines: list[dict | str] = [{"id": "a", "text": "x"}, {"id": "b", "text": "y", field: value}]
    (rejected,) = read_manifest(write(tmp_path / "m.jsonl", lines)).rejected
    assert rejected.reason == f"not a sample: line 2: field {field}: {message}"


def test_gzip_and_other_line_ends_are_read_and_doubled_fields_refused(tmp_path: Path) -> None:
    doubled, two = '{"id": "b", "text": "y", "text": "z"}', '{"id": "c", "text": "z"}{"id": "d", "text": "z"}'
    lines = ['{"id": "a", "text": "x"}', doubled, two]
    for name, raw in (
        ("m.jsonl.gz", gzip.compress("\n".join(lines).encode())),
        ("m.jsonl", "\r".join(lines).encode()),
        ("crlf.jsonl", "\r\n".join(lines).encode()),
    ):
        (tmp_path / name).write_bytes(raw)
        manifest = read_manifest(tmp_path / name)
        assert [line.id for line in manifest.lines] == ["a"]
        assert [entry.reason for entry in manifest.rejected] == [
            'not a sample: line 2: not JSON: the field "text" occurs twice in one object',
            "not a sample: line 3: not JSON: more follows after the value (line 1, column 25)",
        ]


def test_unnamed_splits_follow_the_group(tmp_path: Path) -> None:
    lines = [{"id": str(index), "text": "x", "group": f"g{index // 4}"} for index in range(4000)]
    manifest = read_manifest(write(tmp_path / "m.jsonl", lines))
    assert manifest.splits_source == "group hash"
    assert groups_across_splits(manifest) == 0
    assert 0.03 < Counter(manifest.splits)["valid"] / 4000 < 0.07


def test_named_splits_may_divide_a_group_and_say_so(tmp_path: Path) -> None:
    lines = [{"id": split, "text": "x", "group": "g", "split": split} for split in ("test", "train", "valid")]
    manifest = read_manifest(write(tmp_path / "m.jsonl", lines))
    assert manifest.split_names == ["train", "test", "valid"]
    assert groups_across_splits(manifest) == 1


@settings(deadline=None)
@given(images=st.lists(st.none() | st.integers(0, 6), min_size=1, max_size=40), size=st.integers(1, 9))
def test_shards_hold_every_line_once_and_never_part_an_image(images: list[int | None], size: int) -> None:
    from opt_ds.ingest.manifest import ManifestLine

    lines = [
        ManifestLine(id=str(index), text="x", image=None if image is None else f"{image}.png")
        for index, image in enumerate(images)
    ]
    manifest = Manifest(Path("m"), lines, ["train"] * len(lines), ["train"], "manifest", "")
    shards = manifest.shards(size)
    assert sorted(index for shard in shards for index in shard) == list(range(len(lines)))
    for image in set(images) - {None}:
        assert sum(any(images[index] == image for index in shard) for shard in shards) == 1
    most_shared = max(Counter(image for image in images if image is not None).values(), default=1)
    assert all(len(shard) < size + most_shared for shard in shards)
    assert all(len(shard) >= size for shard in shards[:-1])
