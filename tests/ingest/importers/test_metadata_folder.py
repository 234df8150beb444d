"""Folders with metadata.jsonl or metadata.csv, as Hugging Face's ImageFolder and AudioFolder read them."""

import gzip
import json
from pathlib import Path

import pytest

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import report_path
from opt_ds.ingest.importers.folder import import_folder
from opt_ds.ingest.importers.metadata_folder import import_metadata_folder
from tests.ingest.importers.manifests import left_out, lines_of, touch


def write_lines(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def test_split_folders_with_their_own_metadata(tmp_path: Path) -> None:
    folder, manifest = tmp_path / "birds", tmp_path / "m" / "manifest.jsonl"
    touch(*(folder / split / name for split in ("train", "validation") for name in ("0001.png", "sub/0002.jpg", "left.png")))
    write_lines(
        folder / "train" / "metadata.jsonl",
        {"file_name": "0001.png", "text": "A heron.", "place": "lake"},
        {"file_name": "sub/0002.jpg", "text": ["A crane.", "One crane."]},
        {"file_name": "0001.png", "text": "The heron again."},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "clip.mp4", "text": "a video"},
        {"text": "no file"},
        "{cut off",
    )
    write_lines(folder / "validation" / "metadata.jsonl", {"file_name": "0001.png", "text": "A stork."})
    import_metadata_folder(folder, manifest)
    samples = lines_of(manifest)
    assert {id: (line.split, line.text, line.image) for id, line in samples.items()} == {
        "train/0001.png": ("train", "A heron.", "../birds/train/0001.png"),
        "train/sub/0002.jpg#0": ("train", "A crane.", "../birds/train/sub/0002.jpg"),
        "train/sub/0002.jpg#1": ("train", "One crane.", "../birds/train/sub/0002.jpg"),
        "train/0001.png#1": ("train", "The heron again.", "../birds/train/0001.png"),
        "validation/0001.png": ("valid", "A stork.", "../birds/validation/0001.png"),
    }
    reasons = left_out(manifest)
    assert reasons["train/gone.png"] == "image file is missing: train/gone.png"
    assert reasons["train/metadata.jsonl row 4"] == "file_name names no image or audio file: clip.mp4"
    assert reasons["train/metadata.jsonl row 5"] == "file_name names no image or audio file: None"
    assert reasons["train/metadata.jsonl row 6"].startswith("not JSON: metadata.jsonl line 7")
    unused = {each["what"]: each["names"] for each in json.loads(report_path(manifest).read_text())["unused"]}
    assert unused == {"columns": ["place"], "files": ["train/left.png", "validation/left.png", "validation/sub/0002.jpg"]}


def test_one_csv_of_audio_and_images_for_all_splits(tmp_path: Path) -> None:
    touch(tmp_path / "train" / "a.wav", tmp_path / "train" / "b.png", tmp_path / "test" / "c.flac", tmp_path / "test" / "d.png")
    table = 'file_name,transcription\ntrain/a.wav,"one, two"\ntrain/b.png,three\ntest/c.flac,four\ntest/d.png\n'
    (tmp_path / "metadata.csv").write_text(table)
    manifest = tmp_path / "manifest.jsonl"
    import_metadata_folder(tmp_path, manifest, columns=["text=transcription"])
    assert {id: (line.split, line.text, line.audio, line.image) for id, line in lines_of(manifest).items()} == {
        "train/a.wav": ("train", "one, two", "train/a.wav", None),
        "train/b.png": ("train", "three", None, "train/b.png"),
        "test/c.flac": ("test", "four", "test/c.flac", None),
    }
    assert left_out(manifest) == {"metadata.csv row 3": "not a row of the table: line 5: 1 cells where the header has 2"}
    (tmp_path / "metadata.csv").unlink()
    rows = [{"image_file_name": "train/b.png", "audio_file_name": "train/a.wav", "id": 7, "text": "both"}]
    (tmp_path / "metadata.jsonl.gz").write_bytes(gzip.compress("".join(map(json.dumps, rows)).encode()))
    import_metadata_folder(tmp_path, manifest)
    (line,) = lines_of(manifest).values()
    assert (line.id, line.image, line.audio, line.split) == ("7", "train/b.png", "train/a.wav", None)
    notes = json.loads(report_path(manifest).read_text())["notes"]
    assert "all files are of split train: opt-ds prepare assigns splits" in notes


def test_a_folder_without_a_usable_table_is_refused(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            import_metadata_folder(tmp_path, tmp_path / "m.jsonl")
        assert "\n" not in str(error.value)

    refused("no metadata.jsonl, metadata.csv or metadata.parquet is there")
    write_lines(tmp_path / "metadata.jsonl", {"name": "a.png", "text": "x"})
    refused('metadata.jsonl: no line has the field "file_name"')
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    refused("both metadata.jsonl and metadata.csv are there")
    (tmp_path / "metadata.jsonl").unlink()
    refused("no column image, text or audio|no sample could be taken")
    (tmp_path / "metadata.csv").write_text("file,text\na.png,x\n")
    refused('no column "file_name": it has file, text')
    (tmp_path / "metadata.csv").write_text("file_name,text,text\na.png,x,y\n")
    refused('column "text" occurs twice')


def test_a_plain_folder_import_says_that_metadata_was_not_read(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "A heron."})
    manifest = import_folder(tmp_path, tmp_path / "m" / "manifest.jsonl")
    (note,) = json.loads(report_path(manifest).read_text())["notes"]
    assert note == f"metadata of the files was not read: opt-ds import metadata {tmp_path} reads it"
