"""Tables of image features become files that region_files reads: each published form, gzipped, and with lines that are broken."""

import base64
import gzip
import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.errors import UserError
from opt_ds.features.region_files import RegionFileExtractor, RegionFileOptions
from opt_ds.features.regions import RegionFeatures
from opt_ds.ingest.importers.feature_tables import export_table
from tests.logs import logged_lines

WIDTH, HEIGHT = 640, 480


def base64_of(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def boxes_of(count: int) -> np.ndarray:
    low = np.random.default_rng(count).random((count, 2)) / 2
    return (np.concatenate([low, low + 0.25], 1) * [WIDTH, HEIGHT, WIDTH, HEIGHT]).astype("<f4")


def features_of(seed: int, count: int = 5, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim)).astype("<f4")


def lxmert_row(key: str, seed: int, count: int = 5) -> list[str]:
    """A line as LXMERT's extracting/detectron2_mscoco_proposal_maxnms.py writes it."""
    random = np.random.default_rng(seed)
    return [
        key, str(HEIGHT), str(WIDTH), base64_of(random.integers(0, 1600, count)), base64_of(random.random(count).astype("<f4")),
        base64_of(random.integers(0, 400, count)), base64_of(random.random(count).astype("<f4")), str(count),
        base64_of(boxes_of(count)), base64_of(features_of(seed, count)),
    ]  # fmt: skip


def butd_row(key: str, seed: int) -> list[str]:
    return [key, str(WIDTH), str(HEIGHT), "5", base64_of(boxes_of(5)), base64_of(features_of(seed))]


def with_place(seed: int) -> np.ndarray:
    """Features as Oscar and VinVL publish them: followed by x1, y1, x2, y2, w, h in 0..1."""
    boxes = boxes_of(5) / np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], "<f4")
    return np.concatenate([features_of(seed), boxes, boxes[:, 2:] - boxes[:, :2]], 1).astype("<f4")


def save_lines(path: Path, rows: list[list[str]]) -> Path:
    content = "".join("\t".join(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path: Path, num_classes: int = 1600) -> RegionFeatures:
    (found,) = RegionFileExtractor(RegionFileOptions(dim=8, num_classes=num_classes)).extract([path])
    assert found is not None
    return found


def assert_regions(path: Path, seed: int) -> None:
    """The file has the features of the seed, with their boxes."""
    found, boxes = read(path), boxes_of(5) / np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])
    order = [int(np.flatnonzero((features_of(seed).astype("float16") == row).all(1))[0]) for row in found.features]
    assert sorted(order) == list(range(5))
    np.testing.assert_allclose(found.boxes[:, :4], boxes[order], atol=1e-5)


@pytest.mark.parametrize("ending", ["tsv", "tsv.gz"])
def test_lxmerts_tables_keep_features_boxes_classes_and_scores(ending: str, tmp_path: Path) -> None:
    table = save_lines(tmp_path / f"val2014.{ending}", [lxmert_row("COCO_val2014_000000000042", 1), lxmert_row("b", 2)])
    assert export_table(table, tmp_path / "out") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["COCO_val2014_000000000042.npz", "b.npz"]
    for name, seed in (("COCO_val2014_000000000042.npz", 1), ("b.npz", 2)):
        assert_regions(tmp_path / "out" / name, seed)
    random = np.random.default_rng(1)
    labels, scores = random.integers(0, 1600, 5), random.random(5).astype("<f4")
    order = np.argsort(-scores)
    found = read(tmp_path / "out" / "COCO_val2014_000000000042.npz")
    assert found.labels.tolist() == labels[order].tolist()
    assert found.scores.tolist() == scores[order].astype("float16").tolist()


def test_the_other_published_forms(tmp_path: Path) -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(11), 5).astype("<f4")
    conceptual = ["cc", str(WIDTH), str(HEIGHT), "5", base64_of(boxes_of(5)), base64_of(features_of(3)), base64_of(probabilities)]
    forms = {
        "butd.tsv": butd_row("150367", 3),
        "cc.tsv": conceptual,
        "oscar.tsv": ["k", "5", base64_of(with_place(3))],
        "vinvl.tsv": ["k", json.dumps({"num_boxes": 5, "features": base64_of(with_place(3))})],
    }
    for name, row in forms.items():
        export_table(save_lines(tmp_path / name, [row]), tmp_path / name.removesuffix(".tsv"))
        (path,) = (tmp_path / name.removesuffix(".tsv")).iterdir()
        assert_regions(path, 3)
    assert sorted(read(tmp_path / "cc" / "cc.npz").labels.tolist()) == sorted(probabilities.argmax(1).tolist())
    header = [["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"], butd_row("a", 3)]
    assert export_table(save_lines(tmp_path / "header.tsv", header), tmp_path / "header") == 1
    plain = ["k", "5", base64_of(features_of(3, dim=20))]
    export_table(save_lines(tmp_path / "plain.tsv", [plain]), tmp_path / "plain")
    with np.load(tmp_path / "plain" / "k.npz") as arrays:
        assert arrays.files == ["features"] and arrays["features"].shape == (5, 20), "numbers that are no place are kept"


def test_lines_that_cannot_be_read_are_left_out_and_a_second_call_resumes(tmp_path: Path) -> None:
    good, short, cut, odd = butd_row("good", 1), butd_row("short", 2), butd_row("cut", 3), butd_row("odd", 4)
    odd[3] = "six"
    cut[5] = cut[5][:-9]
    rows = [good, short[:4], cut, odd, butd_row("good", 5), butd_row("a/1.jpg", 6), butd_row("b/1.jpg", 7)]
    table = save_lines(tmp_path / "t.tsv", rows)
    with logged_lines() as logged:
        assert export_table(table, tmp_path / "out") == 3
    assert [line.strip() for line in logged if "left out " in line] == [
        "left out line 2: 4 columns, not 6",
        "left out cut: features is not base64, or truncated",
        "left out odd: num_boxes is 'six', not a number above 0",
        "left out good: its key occurs twice",
    ]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["1.npz", "b%2F1.jpg.npz", "good.npz"]
    assert_regions(tmp_path / "out" / "b%2F1.jpg.npz", 7)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "1.npz").unlink()
    assert export_table(table, tmp_path / "out") == 3
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in ("good.npz", "b%2F1.jpg.npz")), "existing files are kept"


def test_tables_of_arrays_are_taken_apart(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "groups.h5", "w") as file:
        file["a/features"], file["a/bbox"], file["a/image_w"], file["a/image_h"] = features_of(3), boxes_of(5), WIDTH, HEIGHT
        file["b/notes"] = np.ones(3)
    with h5py.File(tmp_path / "arrays.h5", "w") as file:
        file["a"] = features_of(3)
        file["link"] = h5py.SoftLink("/a")
    save_file({"a": features_of(3), "b": features_of(4)}, tmp_path / "t.safetensors")
    np.savez(tmp_path / "t.npz", a=features_of(3), b=features_of(4))
    assert export_table(tmp_path / "groups.h5", tmp_path / "groups") == 1
    assert_regions(tmp_path / "groups" / "a.npz", 3)
    for name in ("arrays.h5", "t.safetensors", "t.npz"):
        out = tmp_path / f"of {name}"
        assert export_table(tmp_path / name, out) == (1 if name == "arrays.h5" else 2)
        assert read(out / "a.npz").features.tolist() == features_of(3).astype("float16").tolist()


def test_arrays_that_no_extractor_reads_are_left_out_with_the_reason(tmp_path: Path) -> None:
    nan = features_of(3)
    nan[2, 1] = np.nan
    odd = {"nan": nan, "cube": np.ones((2, 3, 4), "f4"), "row": np.ones(3, "f4"), "words": np.array(["x", "y"])}
    reasons = [
        "nan: features: NaN or infinite, first in row 2",
        "cube: features of shape [2, 3, 4], not [R, N]",
        "row: features of shape [3], not [R, N]",
        "words: features of dtype <U1, not numbers",
        "objects: its array objects.npy holds Python objects: only numbers are accepted",
        "damaged: its member damaged.npy is damaged",
        "notes.txt: its member notes.txt is not a NumPy array",
    ]
    table = tmp_path / "t.npz"
    np.savez_compressed(
        table, good=features_of(4), **odd, objects=np.array([{}], dtype=object), damaged=features_of(5, 500)
    )
    with zipfile.ZipFile(table, "a") as archive:
        archive.writestr("notes.txt", "made in 2020")
        begin = archive.getinfo("damaged.npy").header_offset
    content = bytearray(table.read_bytes())
    content[begin + 300 : begin + 400] = bytes(100)
    table.write_bytes(content)
    with logged_lines() as logged:
        assert export_table(table, tmp_path / "out") == 1
    assert [line.strip().removeprefix("left out ") for line in logged if "left out " in line] == reasons
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.npz"]
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["good"], file["nan"], file["cube"], file["row"] = features_of(4), nan, odd["cube"], odd["row"]
        file["none"] = np.zeros((0, 8), "f4")
    with logged_lines() as logged:
        assert export_table(tmp_path / "t.h5", tmp_path / "of hdf5") == 1
    found = [line.strip().removeprefix("left out ") for line in logged if "left out " in line]
    assert sorted(found) == sorted([*reasons[:3], "none: features of shape [0, 8]: there is nothing in it"])


@pytest.mark.parametrize("names", [("features", "bbox", "notes"), ("x", "boxes")])
@pytest.mark.parametrize("ending", ["npz", "h5", "safetensors"])
def test_the_arrays_of_one_image_are_no_table(names: tuple[str, ...], ending: str, tmp_path: Path) -> None:
    arrays, path = {name: features_of(3) for name in names}, tmp_path / f"one.{ending}"
    if ending == "npz":
        np.savez(path, **arrays)
    elif ending == "h5":
        with h5py.File(path, "w") as file:
            file.update(arrays)
    else:
        save_file(arrays, path)
    with pytest.raises(UserError, match="the features of one image, not a table: name it as image in a manifest"):
        export_table(path, tmp_path / "out")


def test_other_files_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "captions.tsv").write_text("a\tb\tc\td\n")
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(b"x\t5\tAAAA\n" * 999)[:-20])
    save_file({"features": features_of(3)}, tmp_path / "one.safetensors")
    (tmp_path / "labels.tsv").write_text('k\t[{"class": "dog", "rect": [1, 2, 3, 4], "conf": 0.9}]\n')
    (tmp_path / "cut.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    np.save(tmp_path / "one.npy", features_of(3))
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("k", (tmp_path / "one.npy").read_bytes())
        archive.writestr("k.npy", (tmp_path / "one.npy").read_bytes())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "twice.npz").read_bytes()[:-30])
    for name, message in (
        ("twice.npz", "two of its members are named k: save it again"),
        ("cut.npz", "the NPZ file is truncated or damaged"),
        ("captions.tsv", "line 1 has 4 columns: neither a store nor a table of image features"),
        ("cut.tsv.gz", "the gzip file is truncated or damaged"),
        ("one.safetensors", "the features of one image, not a table"),
        ("labels.tsv", "no entry can be used; k: its JSON has no num_boxes and features"),
        ("cut.h5", "the HDF5 file is truncated or damaged"),
    ):
        with pytest.raises(UserError, match=message):
            export_table(tmp_path / name, tmp_path / "out")
    assert run_command(_build(), ["convert", str(tmp_path / "captions.tsv"), "--output", str(tmp_path / "out")], "opt-ds") == 2
    assert "neither a store nor a table" in capsys.readouterr().err
