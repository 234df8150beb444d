"""Test precomputed regions: an unusual file affects only itself, and wrong units are never accepted as regions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_ds.features.npz_regions import NpzExtractor, NpzOptions
from opt_ds.features.regions import boxes_with_size
from opt_ds.ingest import PrepareSettings
from opt_ds.ingest.file_features import FileFeatures
from tests.ingest.test_update import uniter_arrays

WIDTH, HEIGHT = 640, 480


def small(seed: int = 0, count: int = 30) -> dict[str, Any]:
    arrays = uniter_arrays(seed, count, dim=8)
    return {**arrays, "soft_labels": arrays["soft_labels"][:, :6]}


def extractor() -> NpzExtractor:
    return NpzExtractor(NpzOptions(dim=8, num_classes=6))


def pixels_of(boxes: np.ndarray) -> np.ndarray:
    return boxes.astype("float32") * np.tile([WIDTH, HEIGHT], boxes.shape[1] // 2)


def test_odd_files_are_skipped_with_their_reason_and_the_others_are_kept(tmp_path: Path) -> None:
    files = {name: uniter_arrays(seed) for seed, name in enumerate(("short", "flat", "box", "score", "good"))}
    files["short"]["soft_labels"] = files["short"]["soft_labels"][:7]
    files["flat"]["soft_labels"] = files["flat"]["soft_labels"][:, 0]
    files["box"]["norm_bb"][3, 0] = np.nan
    files["score"]["conf"] = np.where(np.arange(30) == 3, np.nan, files["score"]["conf"])
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    settings = PrepareSettings(images="npz")
    features = FileFeatures({"image": settings.extractor("image")}, settings, "cpu")
    *failures, good = features.chunk("image", [f"{name}.npz" for name in files], tmp_path)
    assert [failure.reason for failure in failures] == [
        "no image features could be made: short.npz: soft_labels of shape [7, 1601], not [30, K]",
        "no image features could be made: flat.npz: soft_labels of shape [30], not [R, N]",
        "no image features could be made: box.npz: norm_bb: NaN or infinite, first in row 3",
        "no image features could be made: score.npz: conf: NaN or infinite, first in row 3",
    ]
    labels = files["good"]["soft_labels"].argmax(1)
    assert np.array_equal(good.item.labels, labels[: len(good.item.labels)])
    assert len(good.item.features) == len(good.item.labels) >= 10


def _with(name: str, change: Any) -> Any:
    def changed(arrays: dict[str, Any]) -> dict[str, Any]:
        value = change(arrays[name].copy())
        return {**arrays, name: value}

    return changed


def _set(place: Any, value: Any) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with("norm_bb", pixels_of), "norm_bb reaches .*, not 1: divide pixels by the image's width and height"),
        (_with("norm_bb", lambda boxes: boxes * 100), "norm_bb reaches"),
        (_with("norm_bb", _set((2, 2), 1.02)), "norm_bb reaches 1.0195"),
        (_with("norm_bb", _set((2, 0), -0.02)), "norm_bb falls to -0.0"),
        (_with("norm_bb", lambda boxes: boxes[:, [2, 3, 0, 1]]), "norm_bb: row 0 ends before it begins"),
        (_with("norm_bb", lambda boxes: boxes[:, [0, 1, 4, 5, 2, 3]]), "row .*: width, height or area do not follow"),
        (_with("norm_bb", lambda boxes: np.c_[boxes, boxes[:, 4]]), "width, height or area do not follow"),
        (_with("norm_bb", lambda boxes: boxes[:, :5]), r"norm_bb of shape \[30, 5\]"),
        (_with("norm_bb", lambda boxes: boxes[None]), r"norm_bb of shape \[1, 30, 6\]"),
        (_with("norm_bb", lambda boxes: boxes[:-1]), "30 features, 29 boxes, 30 scores"),
        (_with("norm_bb", lambda boxes: boxes.astype(str)), "norm_bb of dtype <U32, not numbers"),
        (_with("conf", lambda scores: scores * 100), "conf runs from .* outside 0..1"),
        (_with("conf", lambda scores: -scores), "conf runs from"),
        (_with("conf", lambda scores: np.c_[scores, scores]), r"conf of shape \[30, 2\]"),
        (_with("conf", lambda scores: scores.astype(str)), "conf of dtype .*, not numbers"),
        (_with("soft_labels", _set((1, 1), -0.5)), "soft_labels runs from -0.5"),
        (_with("soft_labels", lambda soft: soft * 30), "soft_labels runs from"),
        (_with("soft_labels", _set(4, 0)), "soft_labels: row 4 gives no class any probability"),
        (_with("soft_labels", _set((1, 1), np.nan)), "soft_labels: NaN"),
        (_with("features", lambda values: values[:0]), "no region is in it"),
        (_with("features", lambda values: values[:, :7]), r"features of shape \[30, 7\], not \[R, 8\]"),
        (_with("features", lambda values: values.astype("float32") * 1e6), "features reach .*, beyond float16"),
        (_with("features", lambda values: values.astype(object)), "features.npy holds Python objects: only numbers are accepted"),
        (_with("features", _set((3, 3), np.inf)), "features: NaN or infinite, first in row 3"),
        (lambda arrays: {name: value for name, value in arrays.items() if name != "conf"}, "it has no array conf"),
    ],
)
def test_what_is_not_what_its_name_says_is_refused(change: Any, reason: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **change(small()))
    with pytest.raises(ValueError, match=f"^a.npz: .*{reason}"):
        extractor().extract([tmp_path / "a.npz"])


def test_the_most_confident_regions_are_kept_best_first() -> None:
    arrays = small(count=150)
    arrays["conf"] = np.linspace(1, 0.25, 150).astype("float16")
    order = np.random.default_rng(2).permutation(150)
    shuffled = {name: values[order] for name, values in arrays.items()}
    sorted_regions, regions = extractor().regions(arrays), extractor().regions(shuffled)
    assert len(regions.features) == 100
    assert (np.diff(regions.scores.astype(float)) <= 0).all()
    assert all(np.array_equal(a, b) for a, b in zip(regions, sorted_regions, strict=True))
    assert np.array_equal(sorted_regions.features, arrays["features"][:100]), "sorted files keep their bytes"


def test_what_half_precision_overshoots_is_clipped() -> None:
    arrays = small()
    arrays["norm_bb"] = np.tile(np.array([0, 0, 1.0005, 1, 1.0005, 1], "float32"), (30, 1))
    for columns in (4, 6):
        boxes = extractor().regions({**arrays, "norm_bb": arrays["norm_bb"][:, :columns]}).boxes
        assert (boxes == [0, 0, 1, 1, 1, 1, 1]).all()


def test_boxes_in_pixels_are_divided_by_the_images_sides() -> None:
    arrays = small()
    expected = extractor().regions(arrays)
    corners = arrays.pop("norm_bb")[:, :4]
    arrays |= {"bbox": pixels_of(corners), "image_w": np.int64(WIDTH), "image_h": np.array([HEIGHT])}
    found = extractor().regions(arrays)
    assert np.abs(found.boxes - expected.boxes).max() < 1e-6
    for changes, reason in (
        ({"image_w": np.int64(100)}, "bbox leaves the image of 100 x 480 pixels"),
        ({"image_h": np.int64(0)}, "image_h is not a length in pixels"),
        ({"bbox": corners}, "bbox holds fractions, not pixels"),
        ({"bbox": arrays["bbox"][:, [2, 3, 0, 1]]}, "bbox: row 0 ends before it begins"),
    ):
        with pytest.raises(ValueError, match=reason):
            extractor().regions({**arrays, **changes})
    del arrays["image_w"]
    with pytest.raises(ValueError, match="it has bbox and no image_w"):
        extractor().regions(arrays)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_files_of_another_kind_are_refused_in_plain_words(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    reasons = r"(it is (an empty file|text): accepted are \.npz|it is a ZIP archive, damaged)"
    with pytest.raises(ValueError, match=f"^a.npz: {reasons}") as caught:
        extractor().extract([tmp_path / "a.npz"])
    assert "pickle" not in str(caught.value)


def test_corners_in_pixels_are_never_clipped_to_the_image() -> None:
    with pytest.raises(ValueError, match="boxes reach 640: they are in pixels"):
        boxes_with_size(np.array([[0, 0, 640, 480]]))
    with pytest.raises(ValueError, match="ends before it begins"):
        boxes_with_size(np.array([[0.5, 0, 0.4, 1]]))
    with pytest.raises(ValueError, match="is outside"):
        boxes_with_size(np.array([[0.5, 0, 1.01, 1]]))
