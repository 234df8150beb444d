"""Test CSV and TSV against a plain reference reader: each row is read as written, or reported with its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import report_path
from opt_ds.ingest.importers.table import import_table
from opt_ds.ingest.importers.tables import BadRow, read_table
from opt_ds.ingest.manifest import read_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abcdef":
        (tmp_path / f"{name}.jpg").write_text(name)
    return tmp_path


def run(folder: Path, content: str | bytes, name: str = "t.csv", **options: Any) -> dict[str, str]:
    """Import a table and return image -> caption."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    import_table(folder / name, folder / "m.jsonl", **options)
    return {str(line.image): str(line.text) for line in read_manifest(folder / "m.jsonl").lines}


def report(folder: Path) -> dict[str, Any]:
    return json.loads(report_path(folder / "m.jsonl").read_text())


def reasons(folder: Path) -> list[str]:
    return [entry["reason"].removeprefix("not a row of the table: ") for entry in report(folder)["skipped_samples"]]


GOOD = {"a.jpg": "a cat", "b.jpg": "a dog"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "image,text\na.jpg,a cat\nb.jpg,a dog\n"),
        ("t.csv", "image,text\r\na.jpg,a cat\r\n\r\nb.jpg,a dog"),
        ("t.csv", "image,text\ra.jpg,a cat\rb.jpg,a dog\r"),
        ("t.csv", '\ufeffimage,text\na.jpg,"a cat"\n"b.jpg",a dog\n'),
        ("t.csv", "image;text\na.jpg;a cat\nb.jpg;a dog\n"),
        ("t.csv", "image\ttext\na.jpg\ta cat\nb.jpg\ta dog\n"),
        ("t.csv", "sep=;\nimage;text\na.jpg;a cat\nb.jpg;a dog\n"),
        ("t.csv", "image,text,\na.jpg,a cat,\nb.jpg,a dog,,\n"),
        ("t.tsv", "image,text\na.jpg,a cat\nb.jpg,a dog\n"),
        ("t.tsv", '"image"\t"text"\n"a.jpg"\t"a cat"\n"b.jpg"\t"a dog"\n'),
        ("t.tsv.gz", gzip.compress(b"image\ttext\na.jpg\ta cat\nb.jpg\ta dog\n", mtime=0)),
        ("t.csv.gz", gzip.compress(b"image,text\na.jpg,a cat\nb.jpg,a dog\n", mtime=0)),
        ("t.csv", gzip.compress(b"image,text\na.jpg,a cat\nb.jpg,a dog\n", mtime=0)),
    ],
)
def test_tables_that_are_read_right(folder: Path, name: str, content: str | bytes) -> None:
    assert run(folder, content, name) == GOOD
    assert reasons(folder) == []


def test_quoted_newlines(folder: Path) -> None:
    assert run(folder, 'image,text\na.jpg,"two, lines\nand ""more"""\n') == {"a.jpg": 'two, lines\nand "more"'}
    content = 'image\ttext\na.jpg\t"two\nlines"\nb.jpg\ta dog\n'
    assert run(folder, content, "t.tsv") == {"a.jpg": "two\nlines", "b.jpg": "a dog"}
    assert report(folder)["notes"] == ["t.tsv: its cells are quoted"]
    content = 'image\ttext\na.jpg\t"a cat\nb.jpg\t"a" dog\n'
    assert run(folder, content, "t.tsv") == {"a.jpg": '"a cat', "b.jpg": '"a" dog'}, "a quote is a letter in a plain TSV"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('image,text\na.jpg,"a cat\nb.jpg,a dog\nc.jpg,a fox\n', 2),
        ('image,text\na.jpg,a cat\nb.jpg,"a dog\nc.jpg,"a fox"\n', 3),
        ('image,text\na.jpg,"a "big" cat"\nb.jpg,a dog\n', 2),
        ('text,image\n"a cat,a.jpg\na dog,b.jpg\n', 2),
    ],
)
def test_a_quote_that_is_not_closed_is_refused_with_its_line(folder: Path, content: str, line: int) -> None:
    with pytest.raises(UserError, match=rf"t.csv line {line}: a quote that opens a cell there is not closed properly"):
        run(folder, content)


def test_a_quote_that_swallows_rows_and_closes_is_seen_by_the_file_in_it(folder: Path) -> None:
    content = 'text,image\na fox,c.jpg\n"a cat,a.jpg\na dog",b.jpg\n'
    assert run(folder, content) == {"c.jpg": "a fox"}
    assert reasons(folder) == ['line 3: a quoted cell holds several lines and "a.jpg": is a quote missing?']


def test_a_text_of_several_lines_may_mention_names_of_files(folder: Path) -> None:
    text = "open\nlogo.png, then\nsound.wav"
    assert run(folder, f'image,text\na.jpg,"{text}"\nb.jpg,x\n') == {"a.jpg": text, "b.jpg": "x"}
    assert run(folder, f'image,text\na.jpg,"{text}\nb.jpg"\n,x\n') == {"None": "x"}, "b.jpg is there"
    run(folder, 'text,image\na fox,gone.jpg\n"a cat,gone.jpg\na dog",b.jpg\nan ox,c.jpg\n')
    assert 'line 3: a quoted cell holds several lines and "gone.jpg": is a quote missing?' in reasons(folder)


def test_rows_that_do_not_fit_the_header_are_named(folder: Path) -> None:
    content = "image,text,labels\na.jpg,a cat,x\nb.jpg\nc.jpg,a fox, red,x\nimage,text,labels\nd.jpg,a\0bee,x\ne.jpg;a;x\n"
    content += "f.jpg,an ox,y\n"
    assert run(folder, content) == {"a.jpg": "a cat", "f.jpg": "an ox"}
    assert reasons(folder) == [
        "line 3: 1 cells where the header has 3",
        "line 4: 4 cells where the header has 3",
        "line 5: the header again",
        "line 6: a NUL character in it",
        "line 7: 1 cells where the header has 3",
    ]
    assert report(folder)["unused"][-1] == {
        "what": "files", "count": 4, "why": f"in {folder}, no entry names them", "names": [f"{n}.jpg" for n in "bcde"]
    }  # fmt: skip


def test_columns_are_named_once_and_unused_ones_are_counted(folder: Path) -> None:
    with pytest.raises(UserError, match='column "text" occurs twice'):
        run(folder, "image,text,text\na.jpg,a cat,a dog\n")
    run(folder, ",image,Text,text,note,note\n0,a.jpg,A,a cat,x,y\n")
    assert report(folder)["unused"][0]["names"] == ["(without a name)", "Text", "note", "note"]
    run(folder, "image,Text\na.jpg,A\n")
    assert report(folder)["unused"][0]["why"] == '--column text="Text" takes Text'


def test_a_table_whose_files_lie_in_split_folders_says_that_they_are_not_splits(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / split / "x.jpg").write_text("x")
    run(folder, "image\ntrain/x.jpg\ntest/x.jpg\n")
    assert "folders test, train, but it has no column split" in report(folder)["notes"][0]
    with pytest.raises(UserError, match='1 of 2 samples name no split, such as "row 1"'):
        run(folder, "image,split\ntrain/x.jpg,train\ntest/x.jpg,\n")


@pytest.mark.parametrize("names", [["a.txt", "b.txt"], ["texts/a.TXT", "", "texts/b.txt"], ["a.jpg", "b.jpg"], ["x.wav"]])
def test_a_text_column_of_file_names_is_refused(folder: Path, names: list[str]) -> None:
    content = "image,text\n" + "".join(f"{letter}.jpg,{name}\n" for letter, name in zip("abc", names, strict=False))
    with pytest.raises(UserError, match=r"column text holds file names, such as .*--column text=COLUMN"):
        run(folder, content)
    assert not (folder / "m.jsonl").exists()
    assert run(folder, content + "f.jpg,see a.txt there\n")["f.jpg"] == "see a.txt there", "not all are names"
    assert run(folder, "image,text\na.jpg,the end.now\nb.jpg,e.g.\n")["b.jpg"] == "e.g."


def test_windows_paths_and_blanks_around_names_are_found(folder: Path) -> None:
    (folder / "pics").mkdir()
    for name in ("pics/1.jpg", " odd.jpg", "back\\slash.jpg"):
        (folder / name).write_text(name)
    found = run(folder, "image,text\npics\\1.jpg,w\n b.jpg ,x\n odd.jpg,y\nback\\slash.jpg,z\n")
    assert found == {"pics/1.jpg": "w", "b.jpg": "x", " odd.jpg": "y", "back\\slash.jpg": "z"}


def test_a_missing_file_of_another_case_or_ending_is_named(folder: Path) -> None:
    (folder / "Pics").mkdir()
    (folder / "Pics" / "2.jpg").write_text("x")
    (folder / "s.flac").write_text("x")
    names = ["a.jpg", "Pics/2.JPG", "pics\\2.png", "Pics/2", "s.wav", "gone.jpg", "../b.jpg", "http://a/b.jpg", "n" * 3000]
    run(folder, "image\n" + "".join(f"{name}\n" for name in names))
    missing = [f"image file is missing: {name}: it is called Pics/2.jpg" for name in names[1:4]]
    assert reasons(folder) == [*missing, *(f"image file is missing: {name}" for name in names[4:])]
    with pytest.raises(UserError, match=r"audio file is missing: s.wav: it is called s.flac"):
        run(folder, "audio\ns.wav\na.wav\n")


def test_splits_of_a_column_are_named_as_those_of_folders(folder: Path) -> None:
    run(folder, "image,split\na.jpg,Train\nb.jpg,val\nc.jpg,TEST\nd.jpg,train\ne.jpg,fold7\n")
    lines = read_manifest(folder / "m.jsonl").lines
    assert [line.split for line in lines] == ["train", "valid", "test", "train", "fold7"]
    said = report(folder)["notes"]
    assert said == ['splits in column split: "Train" is train (1 rows), "val" is valid (1 rows), "TEST" is test (1 rows)']


def test_sounds_that_cannot_be_decoded_are_named_with_what_to_do(folder: Path) -> None:
    (folder / "s.ape").write_bytes(b"MAC \x96\x0f")
    (folder / "w.ape").write_bytes(b"RIFF\0\0\0\0WAVEfmt ")
    run(folder, "audio,text\ns.ape,one\nw.ape,two\n")
    assert reasons(folder) == ["Monkey's Audio cannot be decoded here: s.ape: convert it to WAV or FLAC"]


def test_a_damaged_parquet_file_and_a_number_without_class_are_named(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema({"text": pyarrow.string(), "labels": pyarrow.int64()})
    features = {"labels": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    rows = [{"text": "a", "labels": 1}, {"text": "b", "labels": 7}, {"text": "c", "labels": -1}]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / "t.parquet")
    whole = (folder / "t.parquet").read_bytes()
    run(folder, whole, "t.parquet")
    assert reasons(folder) == ["its label is none of the classes: column labels: 7, of 2 classes"]
    for content in (whole[:-20], whole[:4] + bytes(60) + whole[64:], b"PAR1"):
        with pytest.raises(UserError, match=r"not a Parquet file, or truncated|damaged after row"):
            run(folder, content, "t.parquet")


cells = st.text(alphabet='ab1,;\t"\n\r ', max_size=4)


def reference(text: str, separator: str) -> list[list[str]] | None:
    """RFC 4180 letter by letter: the rows, blank ones left out; None where the quoting is wrong."""
    rows: list[list[str]] = []
    row: list[str] = []
    place = 0
    while place < len(text):
        if text[place] == '"':
            cell, place, closed = "", place + 1, False
            while place < len(text) and not closed:
                if text[place] == '"' and text[place + 1 : place + 2] == '"':
                    cell, place = cell + '"', place + 2
                elif text[place] == '"':
                    closed, place = True, place + 1
                else:
                    cell, place = cell + text[place], place + 1
            if not closed or text[place : place + 1] not in ("", separator, "\n", "\r"):
                return None
        else:
            start = place
            while place < len(text) and text[place] not in (separator, "\n", "\r"):
                place += 1
            cell = text[start:place]
        row.append(cell)
        end = text[place : place + 1]
        place += 1
        if end == separator and place < len(text):
            continue
        if end == separator:
            row.append("")
        if row != [""] or end == separator or text[: place - 1].endswith('"'):
            rows.append(row)
        place += text[place - 1 : place + 1] == "\r\n"
        row = []
    return rows


@settings(deadline=None, max_examples=150)
@given(
    body=st.lists(st.lists(cells, min_size=1, max_size=3), max_size=4),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    name=st.sampled_from(["t.csv", "t.tsv"]),
)
@example(body=[['""\r'], [""]], end="\n", name="t.csv")
def test_no_row_is_merged_dropped_or_shifted(tmp_path_factory: pytest.TempPathFactory, body: list, end: str, name: str) -> None:
    """Rows of any letters, unquoted: what comes out is what the reference reads, row for row, or a report of the row."""
    path = tmp_path_factory.mktemp("t") / name
    separator = "," if name == "t.csv" else "\t"
    text = end.join([separator.join(["image", "text"]), *(separator.join(row) for row in body)])
    path.write_text(text, encoding="utf-8", newline="")
    if separator == "\t":  # a quote is a letter, unless only quoting makes the rows fit
        plain = [row.split("\t") for row in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if row]
        doubled = any(cell[:1] == '"' == cell[-1:] and '""' in cell[1:-1] for row in plain for cell in row)
        quoted = reference(text, "\t")
        expected = quoted if quoted != plain and quoted is not None and {*map(len, quoted)} == {2} else plain
        if expected is quoted and {*map(len, plain)} == {2} and not doubled:
            expected = plain
    else:
        expected = reference(text, ",")
    try:
        rows = list(read_table(path, ("image", "text")).rows)
    except UserError:
        assert expected is None
        return
    assert expected is not None
    assert len(rows) == len(expected) - 1, "none is merged or dropped"
    for row, wanted in zip(rows, expected[1:], strict=True):
        fits = len(wanted) >= 2 and not any(wanted[2:]) and wanted != ["image", "text"]
        assert isinstance(row, BadRow) != fits
        assert isinstance(row, BadRow) or row.cells == wanted


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.tuples(cells, cells.filter(str.strip)), min_size=1, max_size=5), quoted=st.booleans())
def test_what_pythons_writer_writes_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list, quoted: bool) -> None:
    import csv

    path = tmp_path_factory.mktemp("t") / "t.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
        writer.writerows([("id", "text"), *rows])
    read = list(read_table(path, ("id", "text")).rows)
    assert [row.cells for row in read if not isinstance(row, BadRow)] == [list(row) for row in rows if row != ("id", "text")]


def test_a_cell_of_two_quotes_makes_no_quoted_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('caption\turl\na "red" cat\tu1\n""\tu2\n\tu3\n')
    assert [row.cells for row in read_table(path, ["caption"]).rows] == [['a "red" cat', "u1"], ['""', "u2"], ["", "u3"]]
    path.write_text('"caption"\t"url"\n"a cat"\t"u1"\n""\t"u2"\n')
    assert [row.cells for row in read_table(path, ["caption"]).rows] == [["a cat", "u1"], ["", "u2"]], "there it is an empty cell"
