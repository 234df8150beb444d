"""Strict JSON, and arrays read block by block: the value that Python reads, or why there is none, in the user's words."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ds.errors import UserError
from opt_ds.ingest import text_files
from opt_ds.ingest.importers.tables import read_rows
from opt_ds.ingest.text_files import JsonError, parse_json, read_json, read_json_array, read_json_lines

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)

WRONG = [
    ('{"a": 1, "b": {"c": 1, "c": 2}}', 'the field "c" occurs twice'),
    ('{"a": NaN}', "NaN is not a JSON value: write null"),
    ('{"a": -Infinity}', "-Infinity is not a JSON value"),
    ("[" * 100_000, "nested too deeply"),
    ('{"a": 1} {"a": 2}', r"more follows after the value \(line 1, column 10\)"),
    ('{"a": [1, 2', "it is truncated"),
    ('{"a": "x', "it is truncated"),
    ('{"a": 1,}', "see line 1, column 9"),
    ("", "it is empty"),
    ("9" * 5000, "too many digits"),
]


@pytest.mark.parametrize(("text", "why"), WRONG)
def test_what_is_no_strict_json_says_why_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(JsonError, match=why):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"a.json: not JSON: .*{why}") as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[1, 2", "it is truncated"),
        ('[{"a": 1}, {"a"', "it is truncated"),
        ("[1 2]", "a comma or ] is missing"),
        ('["a" "b"]', "a comma or ] is missing"),
        ("[1,]", "see line"),
        ("[,1]", "see line"),
        ("[1,,2]", "see line"),
        ("[1] [2]", "more follows after the end of the array"),
        ('[{"a": 1, "a": 2}]', "occurs twice"),
        ("[[NaN]]", "write null"),
        ("[" * 100_000, "nested too deeply"),
        ("", "not a JSON array"),
        ("{}", "not a JSON array"),
    ],
)
def test_arrays_are_as_strict(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"a.json: not .*{why}|a.json: {why}"):
        list(read_json_array(tmp_path / "a.json"))


@settings(deadline=None, max_examples=60)
@given(content=st.lists(values, max_size=5), block=st.integers(1, 9), indent=st.none() | st.just(1))
def test_arrays_come_out_as_python_reads_them(
    tmp_path_factory: pytest.TempPathFactory, content: list[Any], block: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("j") / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content, indent=indent).encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_JSON_BLOCK", block)
        assert list(read_json_array(path)) == content
    assert read_json(path) == content


@settings(deadline=None, max_examples=60)
@given(
    content=st.lists(st.dictionaries(st.text(max_size=3), values, max_size=2), max_size=5),
    spoil=st.none() | st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=2)),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_lines_come_out_one_by_one_or_are_reported(
    tmp_path_factory: pytest.TempPathFactory, content: list[Any], spoil: tuple[int, bytes] | None, end: str
) -> None:
    raw = end.join(map(json.dumps, content)).encode()
    if spoil is not None:
        place = spoil[0] % (len(raw) + 1)
        raw = raw[:place] + spoil[1] + raw[place + 1 :]
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    path.write_bytes(raw)
    if raw.startswith((b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff")):  # its first bytes are now those of gzip or UTF-16
        try:
            assert all(isinstance(line, (dict, str)) for line in dict(read_json_lines(path)).values())
        except UserError as error:
            assert str(path) in str(error)
        return
    read = dict(read_json_lines(path))
    plain = raw.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for number, line in enumerate(plain.split(b"\n"), 1):
        try:
            expected = json.loads(line.decode("utf-8"), parse_constant=lambda name: 1 / 0)
        except (ValueError, ZeroDivisionError):
            expected = None
        if not line.strip():
            assert number not in read
        elif isinstance(expected, dict):
            assert read[number] == expected or "occurs twice" in str(read[number])
        else:
            assert isinstance(read[number], str)


def test_text_in_another_encoding_or_cut_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"caption": "café"}'.encode("latin-1"))
    whole = gzip.compress(b"a caption\thttp://a.b/c.png\n" * 100)
    (tmp_path / "cut.tsv.gz").write_bytes(whole[:-9])
    (tmp_path / "not.tsv.gz").write_bytes(b"a caption\thttp://a.b/c.png\n")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"[1, 2")[:-9])
    (tmp_path / "latin.csv").write_bytes("café,x".encode("latin-1"))
    (tmp_path / "wide.csv").write_bytes("café,x".encode("utf-32"))
    (tmp_path / "cut.csv").write_bytes("café,x".encode("utf-16")[:-1])
    (tmp_path / "t.csv").write_bytes(b"PK\x03\x04")
    assert list(read_json_lines(tmp_path / "latin.jsonl")) == [(1, "not UTF-8 text (byte 16)")]
    for name, read, why in (
        ("latin.csv", lambda path: read_rows(path, ",", quoted=True), "not UTF-8 text: save it as UTF-8"),
        ("wide.csv", lambda path: read_rows(path, ",", quoted=True), "not UTF-8 text but UTF-32: save it as UTF-8"),
        ("cut.csv", lambda path: read_rows(path, ",", quoted=True), "begins as UTF-16 text, but is truncated or damaged"),
        ("t.csv", lambda path: read_rows(path, ",", quoted=True), "ZIP archive, not a text file: unpack it"),
        ("cut.tsv.gz", lambda path: read_rows(path, "\t", quoted=False), "the gzip file is truncated or damaged"),
        ("not.tsv.gz", lambda path: read_rows(path, "\t", quoted=False), "not a gzip file"),
        ("cut.json.gz", read_json_array, "the gzip file is truncated or damaged"),
    ):
        with pytest.raises(UserError, match=f"{name}: {why}"):
            list(read(tmp_path / name))


def test_large_json_arrays_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opt_ds.ingest.text_files._JSON_BLOCK", 7)
    content = [{"id": index, "text": "x" * index, "list": [1, [2, {"]": "[,"}]]} for index in range(20)] + [12345678901]
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    assert list(read_json_array(tmp_path / "a.json")) == content


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("encoding", "mark"), [("utf-8", ""), ("utf-8-sig", ""), ("utf-16-le", "\ufeff"), ("utf-16-be", "\ufeff")]
)
def test_a_byte_order_mark_decides_between_utf8_and_utf16(encoding: str, mark: str, packed: bool, tmp_path: Path) -> None:
    def written(name: str, text: str) -> Path:
        content = f"{mark}{text}".encode(encoding)
        path = tmp_path / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
        return path

    captions = [f"caption {number} \u4e0d \U0001f600" for number in range(5000)]  # more than one block, and a surrogate pair
    table = written("a.tsv", "".join(f"{caption}\t1\r\n" for caption in captions))
    assert [row.cells for row in read_rows(table, "\t", quoted=False)] == [[caption, "1"] for caption in captions]
    lines = written("a.jsonl", "".join(json.dumps({"t": caption}, ensure_ascii=False) + "\r\n" for caption in captions))
    assert [value for _, value in read_json_lines(lines)] == [{"t": caption} for caption in captions]
    array = written("a.json", json.dumps(captions, ensure_ascii=False))
    assert list(read_json_array(array)) == captions and read_json(array) == captions
