"""Splits from folders are inferred, said, or refused with the way out; files that are no samples are counted and named."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import report_path
from opt_ds.ingest.importers.folder import folder_manifest, import_folder
from opt_ds.ingest.manifest import read_manifest
from tests.ingest.importers.manifests import left_out, lines_of, touch
from tests.logs import logged_lines


def make(folder: Path, names: Iterable[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def run(folder: Path, **options: Any) -> dict[str, str | None]:
    with logged_lines() as logged:
        manifest = import_folder(folder, folder.parent / "m.jsonl", **options)
    found = {line.id: line.split for line in read_manifest(manifest, allow_outside=True).lines}
    assert (any(found.values())) == any("splits from the folders" in line for line in logged)
    return found


def unused(folder: Path) -> list[str]:
    report = json.loads(report_path(folder.parent / "m.jsonl").read_text())
    return [name for each in report["unused"] for name in each["names"]]


BESIDE = [
    "README.txt", "__MACOSX/train/._a.jpg", ".DS_Store", "train/._a.jpg", "Thumbs.db", "LICENSE", "classes.txt", "test/.x/b.jpg",
]  # fmt: skip


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Train", "TEST"), ("training", "validation"), ("train2017", "val2017"), ("train", "dev")],
)
def test_what_lies_beside_the_splits_does_not_end_them(tmp_path: Path, train: str, test: str) -> None:
    folder = make(tmp_path / "f", [f"{train}/a.jpg", f"{test}/a.jpg"])
    other = "test" if test.lower() == "test" else "valid"
    assert run(folder) == {f"{train}/a": "train", f"{test}/a": other}
    make(folder, [name.replace("train/", f"{train}/").replace("test/", f"{test}/") for name in BESIDE])
    assert run(folder) == {f"{train}/a": "train", f"{test}/a": other}
    assert len(unused(folder)) == len(BESIDE)


@pytest.mark.parametrize("more", ["loose.jpg", "extra/a.jpg", "test-old/a.jpg", "deep/er/a.jpg", "loose.txt loose.png"])
def test_samples_beside_the_splits_are_refused_with_the_way_out(tmp_path: Path, more: str) -> None:
    folder = make(tmp_path / "f", ["train/a.jpg", "test/a.jpg", *more.split()])
    with pytest.raises(UserError, match=r"look like splits, but samples are outside.*--folder-splits.*--no-folder-splits"):
        run(folder)
    assert run(folder, folder_splits=True) == {"train/a": "train", "test/a": "test"}
    assert set(run(folder, folder_splits=False).values()) == {None}


@pytest.mark.parametrize(
    "names",
    [["data/train/a.jpg", "data/test/a.jpg"], ["cat/train/a.jpg", "dog/val/a.jpg"], ["train-clean/a.wav", "test-other/a.wav"],
     ["train_images/a.jpg", "test_images/a.jpg"], ["train-clean-100/a.wav", "dev-other/a.wav"],
     ["x/train_part1/a.jpg", "x/val.data/a.jpg"], ["train_set_2/a.jpg", "Test Set/a.jpg"],
     ["train_v2/a.jpg", "test_v2b/a.jpg"], ["train-raw/a.jpg", "test2017_resized/a.jpg"]],
)  # fmt: skip
def test_splits_that_are_nearly_there_are_refused(tmp_path: Path, names: list[str]) -> None:
    folder = make(tmp_path / "f", names)
    with pytest.raises(UserError, match=r"look like splits, but they are not called train, valid and test.*--no-folder-splits"):
        run(folder)
    assert set(run(folder, folder_splits=False).values()) == {None}


def test_classes_as_folders_are_no_splits(tmp_path: Path) -> None:
    names = ["cat/a", "dog/a", "trainer/a", "train_station/a", "test_tube/a", "test-flight/a", "val d'isere/a"]
    found = run(make(tmp_path / "f", [f"{name}.jpg" for name in names]))
    assert found == dict.fromkeys(names)
    with pytest.raises(UserError, match="no folder called train, valid or test"):
        run(tmp_path / "f", folder_splits=True)


def test_files_that_do_not_join_are_counted(tmp_path: Path) -> None:
    folder = make(tmp_path / "f", ["a.jpg", "a.txt", "b.jpg", "b.jpg.txt", "c.jpg", "c.txt"])
    assert set(run(folder)) == {"a", "b", "b.jpg", "c"}
    notes = json.loads(report_path(tmp_path / "m.jsonl").read_text())["notes"]
    assert notes == [
        "names with image and text: 2, image: 1, text: 1",
        "b.jpg and b.jpg.txt differ in more than the ending: not paired; give the files of a sample one name in one folder "
        "(a.jpg, a.txt)",
    ]


def test_one_nearly_equal_name_does_not_refuse_a_folder_of_good_samples(tmp_path: Path) -> None:
    folder = make(tmp_path / "f", [*(f"{number}.jpg" for number in range(30)), "note.jpg", "Note.txt"])
    assert len(run(folder)) == 32
    (_, note) = json.loads(report_path(tmp_path / "m.jsonl").read_text())["notes"]
    assert note.startswith("Note.txt and note.jpg differ in case: not paired; give the files")
    make(folder, [f"{number}.JPG.txt" for number in range(5)])
    with pytest.raises(UserError, match="6 pairs of files have nearly the same name"):
        run(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_texts_in_utf16_are_read_by_their_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "f", ["a.jpg"])
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (folder / "a.txt").write_bytes(f"{mark}ein schöner Tag\r\n".encode(encoding))
    (folder / "b.txt").write_bytes("ein schöner Tag".encode("utf-16-le"))
    assert set(run(folder)) == {"a"}
    (line,) = read_manifest(tmp_path / "m.jsonl", allow_outside=True).lines
    assert line.text == "ein schöner Tag"


@pytest.mark.parametrize(
    ("names", "difference"),
    [
        ("images/a.jpg captions/a.txt images/b.jpg captions/b.txt", "captions/a.txt and images/a.jpg lie in different folders"),
        ("train/images/a.jpg train/texts/a.txt val/images/b.jpg val/texts/b.txt", "lie in different folders"),
        ("x/pics/1/a.jpg x/wav/1/a.flac", "x/pics/1/a.jpg and x/wav/1/a.flac lie in different folders"),
        ("mine/a.jpg words/a.txt", "mine/a.jpg and words/a.txt lie in different folders"),
        ("a.jpg a.jpg.txt b.png b.png.txt", "a.jpg and a.jpg.txt differ in more than the ending"),
        ("1.wav 1.normalized.txt", "1.normalized.txt and 1.wav differ in more than the ending"),
        ("a.JPG A.txt", "A.txt and a.JPG differ in case"),
        ("84-1-0000.flac 84-1-0001.flac 84-1.trans.txt", "audio and a file of several transcripts"),
    ],
)
def test_pairs_of_nearly_one_name_are_refused_with_the_way_out(tmp_path: Path, names: str, difference: str) -> None:
    folder = make(tmp_path / "f", names.split())
    with pytest.raises(UserError, match=f"0 samples have files of two kinds.*{difference}.*opt-ds import table") as error:
        run(folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m.jsonl").exists()


def test_names_that_have_nothing_to_do_with_each_other_are_samples_alone(tmp_path: Path) -> None:
    found = run(make(tmp_path / "f", ["train/a.jpg", "train/b.txt", "test/a.txt", "test/c.wav"]))
    assert set(found) == {"train/a", "train/b", "test/a", "test/c"}, "splits are apart"


def test_composed_and_decomposed_names_are_one(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert set(run(make(tmp_path / "f", [f"{composed}.jpg", f"{decomposed}.txt"]))) == {decomposed}
    assert set(run(make(tmp_path / "g", [f"{decomposed}.jpg", f"{decomposed}.txt"]))) == {decomposed}
    (line,) = read_manifest(tmp_path / "m.jsonl", allow_outside=True).lines
    assert line.image is not None and line.text == f"{decomposed}.txt"


def test_only_files_about_the_collection_are_no_samples(tmp_path: Path) -> None:
    about = ["README.txt", "ReadMe.de.txt", "LICENSE-MIT.txt", "changes.txt", "Credits.txt", "notice.txt", "sub/README.txt"]
    texts = ["about the weather.txt", "about_me.txt", "license plate.txt", "sub/credits.txt", "sub/changes.txt"]
    found = run(make(tmp_path / "f", [*about, *texts, "readme.jpg", "sub/license_7.txt"]))
    assert set(found) == {*(name.removesuffix(".txt") for name in texts), "readme", "sub/license_7"}
    assert sorted(unused(tmp_path / "f")) == sorted(about)


def test_texts_alone_in_split_folders(tmp_path: Path) -> None:
    folder = make(tmp_path / "f", ["train/a.txt", "test/a.txt", "readme.txt"])
    assert run(folder) == {"train/a": "train", "test/a": "test"}
    with pytest.raises(UserError, match="samples are outside"):
        run(make(folder, ["b.txt"]))


def test_every_ending_is_known_and_what_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    names = ["a.jfif", "b.jpe", "c.heif", "d.JPX", "e.oga", "f.aiff", "g.wave", "h.w64"]
    folder = make(tmp_path / "f", [*names, "i.ape", "i.txt", "j.svgz", "k.pdf", "l.npz", "n.docx"])
    (folder / "m").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "o.jpg").write_text("<!DOCTYPE html><html>not found</html>")
    (folder / "nowhere.jpg").symlink_to(folder / "gone.jpg")
    assert set(run(folder)) == {*(name[0] for name in names), "m"}
    report = json.loads(report_path(tmp_path / "m.jsonl").read_text())
    assert [entry["reason"] for entry in report["skipped_samples"]] == [
        "Monkey's Audio cannot be decoded here: i.ape: convert it to WAV or FLAC",
        "compressed SVG cannot be decoded here: j.svgz: decompress it to .svg",
        "HTML page cannot be decoded here: o.jpg: download the file itself, not a page about it",
    ]
    assert unused(folder) == ["k.pdf", "l.npz", "n.docx", "nowhere.jpg"]


def test_files_newer_than_the_manifest_that_is_used_are_counted(tmp_path: Path, logged: list[str]) -> None:
    folder = make(tmp_path / "f", ["a.jpg", "a.txt", "b.jpg", "b.txt", "store/vocab.txt", "store/store.json"])
    (folder / "store" / "vocab.txt").unlink()
    manifest = folder_manifest(folder)
    logged.clear()
    folder_manifest(folder)
    assert logged == [f"{manifest}: found; remove it to have the folder read again"]
    later = manifest.stat().st_mtime_ns + 10**9
    make(folder, ["c.jpg", "store/vocab.txt", ".hidden/x.jpg"])
    for name in ("a.txt", "c.jpg", "store/vocab.txt", ".hidden/x.jpg", "manifest.report.json"):
        os.utime(folder / name, ns=(later, later))
    folder_manifest(folder)
    assert logged[2].startswith("note: 2 files are newer than manifest.jsonl, which is used as it is; remove it and the store")
    report_path(manifest).unlink()
    folder_manifest(folder)
    assert len(logged) == 4, "a manifest of the user's own is not compared"


def test_texts_that_the_import_left_out_are_named_once_they_can_be_used(tmp_path: Path, logged: list[str]) -> None:
    """`opt-ds prepare --retry-skipped` uses the manifest as it is: what it cannot take in must not be left out in silence."""
    folder = make(tmp_path / "f", ["train/a.jpg", "train/a.txt", "valid/b.jpg", "valid/b.txt"])
    (folder / "train" / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "train" / "blank.txt").write_text(" ")
    manifest = folder_manifest(folder)
    before = manifest.read_bytes()
    logged.clear()
    folder_manifest(folder, retry_skipped=True)
    assert len(logged) == 1, "nothing can be used yet"
    (folder / "train" / "latin.txt").write_text("café", encoding="utf-8")
    folder_manifest(folder)
    assert not any("can be used now" in line for line in logged)
    folder_manifest(folder, retry_skipped=True)
    assert '1 sample that the import left out can be used now, such as "train/latin": --retry-skipped does not' in logged[-1]
    assert manifest.read_bytes() == before


def test_a_folder_joins_files_of_one_name(tmp_path: Path, logged: list[str]) -> None:
    top = tmp_path / "mine"
    touch(top / "train" / "cat.jpg", top / "train" / "cat.wav", top / "val" / "dog.PNG", top / "val" / "twice.jpg")
    touch(top / "val" / "twice.png", top / "val" / "notes.pdf")
    (top / "train" / "cat.txt").write_text("A cat\n", encoding="utf-8")
    (top / "train" / "latin.txt").write_bytes(b"caf\xe9")
    (top / "train" / "blank.txt").write_text(" \n")
    manifest = folder_manifest(top)
    samples = lines_of(manifest)
    assert sorted(samples) == ["train/cat", "val/dog"]
    cat = samples["train/cat"]
    assert (cat.image, cat.text, cat.audio, cat.split) == ("train/cat.jpg", "A cat", "train/cat.wav", "train")
    assert samples["val/dog"].split == "valid"
    assert left_out(manifest) == {
        "train/latin": "the text is not UTF-8: latin.txt",
        "train/blank": "the text is empty",
        "val/twice": "two files of one kind: twice.jpg and twice.png",
    }
    before = manifest.read_bytes()
    assert folder_manifest(top).read_bytes() == before
    assert "found" in logged[-1] and "3 samples were left out when it was written, see manifest.report.json" in logged[-1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no image, audio or \.txt file there"):
        import_folder(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "importer"),
    [("00000.tar", "webdataset"), ("train/state.json", "hugging-face"), ("data/a.parquet", "hugging-face"), ("wav.scp", "kaldi")],
)
def test_a_folder_of_another_importer_is_refused_with_its_name(name: str, importer: str, tmp_path: Path) -> None:
    touch(tmp_path / name)
    with pytest.raises(UserError, match=f"no image, audio or .txt file there; .*: opt-ds import {importer} reads such a folder"):
        import_folder(tmp_path)
