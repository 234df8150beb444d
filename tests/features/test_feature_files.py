"""Own features: every format gives the same regions and frames, and an unusual file affects only itself."""

import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from opt_ds.decoding.decoder import DecodingError, load_arrays
from opt_ds.errors import UserError
from opt_ds.features.frame_files import FrameFileExtractor, FrameFileOptions
from opt_ds.features.region_files import RegionFileExtractor, RegionFileOptions
from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.training.preflight import settle

FORMATS = ("npz", "npy", "safetensors", "h5")


def save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Write the arrays in the format of the file's ending; .npy has the features only."""
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    elif path.suffix == ".npy":
        np.save(path, arrays["features"])
    elif path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata={"by": "a test"})
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                options = {"compression": "gzip", "shuffle": True} if array.size > 9 else {}
                file.create_dataset(name, data=array, **options)
    return path


def regions(count: int = 5, dim: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    low = random.random((count, 2)) / 2
    return {
        "features": random.standard_normal((count, dim)).astype("float32"),
        "boxes": np.concatenate([low, low + 0.25], 1).astype("float32"),
        "scores": random.random(count).astype("float32"),
        "labels": random.integers(0, 7, count),
    }


def reader(**options: Any) -> RegionFileExtractor:
    return RegionFileExtractor(RegionFileOptions(**{"dim": 6, "num_classes": 7, **options}))


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_the_features_that_are_in_it(ending: str, tmp_path: Path) -> None:
    arrays = regions()
    (found,) = reader().extract([save(tmp_path / f"a.{ending}", arrays)])
    assert found is not None
    if ending == "npy":
        order = np.arange(5)
        assert found.boxes.tolist() == [[0, 0, 1, 1, 1, 1, 1]] * 5 and found.scores.tolist() == [1] * 5
        assert found.labels.tolist() == [0] * 5
    else:
        order = np.argsort(-arrays["scores"])
        assert found.boxes[:, :4].tolist() == arrays["boxes"][order].tolist()
        assert found.scores.tolist() == arrays["scores"][order].astype("float16").tolist()
        assert found.labels.tolist() == arrays["labels"][order].tolist()
    assert found.features.tolist() == arrays["features"][order].astype("float16").tolist()
    (frames,) = FrameFileExtractor(FrameFileOptions(dim=6, frame_rate_hz=50)).extract([tmp_path / f"a.{ending}"])
    assert frames is not None and frames.tolist() == arrays["features"].astype("float16").tolist()


def test_a_file_with_one_array_of_any_name_and_the_halves_of_other_libraries(tmp_path: Path) -> None:
    array = np.arange(12, dtype="float32").reshape(2, 6)
    np.savez(tmp_path / "a.npz", array)
    save(tmp_path / "a.h5", {"last_hidden_state": array})
    save_torch_file({"embeddings": torch.from_numpy(array).bfloat16()}, tmp_path / "b.safetensors")
    save_torch_file({"embeddings": torch.from_numpy(array).half()}, tmp_path / "h.safetensors")
    np.save(tmp_path / "d.npy", array.astype("float64"))
    np.save(tmp_path / "f.npy", np.asfortranarray(array))
    names = ("a.npz", "a.h5", "b.safetensors", "h.safetensors", "d.npy", "f.npy")
    for found in reader().extract([tmp_path / name for name in names]):
        assert found is not None and found.features.tolist() == array.tolist()


def test_files_of_bottom_up_attention_pytorch_are_read_as_they_are(tmp_path: Path) -> None:
    """The call of its extract_features.py."""
    features = np.random.default_rng(0).standard_normal((3, 6)).astype("float32")
    bbox = np.array([[0, 0, 320, 240], [10, 20, 30, 40], [0, 0, 640, 480]], "float32")
    info = {"image_id": "000001", "objects_id": np.array([1, 2, 3]), "objects_conf": np.array([0.9, 0.8, 0.7])}
    np.savez_compressed(tmp_path / "000001.npz", x=features, bbox=bbox, num_bbox=3, image_h=480, image_w=640, info=info)
    options = RegionFileExtractor.settle(RegionFileOptions(), [tmp_path / "000001.npz"])
    (found,) = RegionFileExtractor(options).extract([tmp_path / "000001.npz"])
    assert found is not None and found.features.tolist() == features.astype("float16").tolist()
    np.testing.assert_allclose(found.boxes[:, :4], bbox / [640, 480, 640, 480], rtol=1e-6)


def test_the_selection_is_that_of_the_options(tmp_path: Path) -> None:
    arrays = regions(count=20)
    path, order = save(tmp_path / "a.npz", arrays), np.argsort(-arrays["scores"])
    confident = int((arrays["scores"] > 0.5).sum())
    assert 2 < confident < 18
    for options, kept in (({}, 20), ({"confidence": 0.5, "min_regions": 2}, confident), ({"confidence": 0.99}, 10),
                          ({"max_regions": 4}, 4)):  # fmt: skip
        (found,) = reader(**options).extract([path])
        assert found is not None and found.features.tolist() == arrays["features"][order][:kept].astype("float16").tolist()


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"features": np.ones((5, 4), "f4")}, {}, "features of 4 values, not 6 as the first file"),
        ({"features": np.full((5, 6), np.nan, "f4")}, {}, "features: NaN or infinite, first in row 0"),
        ({"features": np.full((5, 6), 1e6, "f4")}, {}, "beyond float16"),
        ({"features": np.ones((1, 5, 6), "f4")}, {}, r"features of shape \[1, 5, 6\], not \[R, N\]"),
        ({"features": np.zeros((0, 6), "f4")}, {}, "there is nothing in it"),
        ({"boxes": np.ones((4, 4), "f4")}, {}, "5 features, 4 boxes"),
        ({"boxes": np.full((5, 4), 300, "f4")}, {}, "norm_bb reaches 300"),
        ({"scores": np.full(5, 2, "f4")}, {}, "conf runs from"),
        ({"scores": np.full(5, np.nan, "f4")}, {}, "conf: NaN"),
        ({"labels": np.full(5, 9)}, {}, r"labels run from 9 to 9, outside 0\.\.6"),
        ({"labels": np.ones(5, "f4")}, {}, "labels of dtype float32, not integers"),
        ({"labels": np.ones(3, "i8")}, {}, "3 labels"),
        ({}, {"num_classes": None}, r"it has labels: set their number with --extractor-option image\.num_classes=K"),
        ({"x": np.ones((5, 6), "f4")}, {}, "it has both x and features"),
    ],
)
def test_what_does_not_fit_names_the_file_and_the_array(
    change: dict[str, np.ndarray], options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "odd.npz", {**regions(), **change})
    with pytest.raises(ValueError, match=f"odd.npz: .*{reason}"):
        reader(**options).extract([path])
    assert reader(num_classes=0).extract([save(tmp_path / "good.npz", regions())])[0] is not None, "labels are left out"


def test_broken_and_hostile_files_cost_a_reason(tmp_path: Path) -> None:
    good = save(tmp_path / "good.safetensors", regions()).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(good[:-7])
    header = json.dumps({"features": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "lies.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    header = json.dumps({"features": {"dtype": "BOOL", "shape": [2, 4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "bool.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (tmp_path / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    npy = save(tmp_path / "cut.npy", regions()).read_bytes()
    (tmp_path / "cut.npy").write_bytes(npy[:-7])
    hdf5 = save(tmp_path / "cut.h5", regions()).read_bytes()
    (tmp_path / "cut.h5").write_bytes(hdf5[: len(hdf5) // 2])
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["features"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "features")
        file["boxes"] = np.ones((5, 4), "f4")
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file["sample-1/features"] = np.ones((5, 6), "f4")
    (tmp_path / "text.npy").write_text("no array")
    array = tmp_path / "plain.npy"
    np.save(array, np.ones((5, 6), "f4"))
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("features", array.read_bytes())
        archive.writestr("features.npy", array.read_bytes())
    np.savez_compressed(tmp_path / "bits.npz", features=np.random.default_rng(0).normal(size=(50, 60)))
    bits = bytearray((tmp_path / "bits.npz").read_bytes())
    bits[len(bits) // 2] ^= 255
    (tmp_path / "bits.npz").write_bytes(bits)
    for name, reason in (
        ("cut.safetensors", "it is a safetensors file, truncated"),
        ("lies.safetensors", r"its array features is declared as \[9, 9\], which the file does not hold"),
        ("bool.safetensors", "its array features has dtype BOOL: save it as F16 or F32"),
        ("objects.npy", "holds Python objects"),
        ("cut.npy", "it is a NumPy array, truncated"),
        ("cut.h5", "it is an HDF5 file, damaged"),
        ("link.h5", "its array features is a link, which is not followed"),
        ("group.h5", "sample-1 in it is no array"),
        ("twice.npz", "two of its members are named features: save it again"),
        ("bits.npz", "it is a ZIP archive, damaged"),
        ("text.npy", "it is text: accepted are .npz, .npy, safetensors and HDF5 files of numbers"),
    ):
        with pytest.raises(DecodingError, match=reason):
            load_arrays(tmp_path / name)
    assert load_arrays(tmp_path / "list.safetensors") == {}


@pytest.mark.parametrize("ending", ["npy", pytest.param("h5", marks=pytest.mark.faults)])
def test_a_store_of_own_features_takes_their_sizes_and_reports_others(ending: str, tmp_path: Path) -> None:
    lines = []
    for number in range(4):
        dim = 9 if number == 2 else 6
        save(tmp_path / f"i{number}.{ending}", {"features": regions(dim=dim, seed=number)["features"]})
        save(tmp_path / f"a{number}.{ending}", {"features": np.full((8, 5), np.nan if number == 3 else number, "float32")})
        lines.append({"id": f"s{number}", "image": f"i{number}.{ending}", "audio": f"a{number}.{ending}", "split": "train"})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = PrepareSettings(
        images="region_files", speech="frame_files", extractor_options={"audio": {"frame_rate_hz": 25.0}}, pool_frames=2,
        max_frames=3, vocab_size=40,
    )  # fmt: skip
    prepare(tmp_path / "manifest.jsonl", tmp_path / "store", settings, workers=1, device="cpu")
    store = FeatureStore(tmp_path / "store")
    dims = store.description.dims
    assert (dims.image_feature_dim, dims.image_num_classes, dims.audio_feature_dim, dims.audio_frame_rate_hz) == (6, 0, 5, 12.5)
    assert [store.sample_id(index) for index in range(store.num_samples)] == ["s0", "s1"]
    assert store.description.extractors["image"]["dim"] == 6 and store.description.extractors["audio"]["dim"] == 5
    assert store.frames(store.rows[1, 2]).tolist() == [[1] * 5] * 3
    assert inspect_store(tmp_path / "store").failures == []
    config, *_ = settle("opt-base", [], [str(tmp_path / "store")])
    assert (config.model.image_feature_dim, config.model.image_num_classes, config.model.audio_feature_dim) == (6, 0, 5)
    report = json.loads((tmp_path / "store" / "report.json").read_text())
    assert [(entry["id"], entry["reason"]) for entry in report["skipped_samples"]] == [
        ("s2", f"no image features could be made: i2.{ending}: features of 9 values, not 6 as the first file"),
        ("s3", f"no audio features could be made: a3.{ending}: features: NaN or infinite, first in row 0"),
    ]
    assert report["truncated"]["audio"] == ["s0", "s1"]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"id": "a", "image": "a.npy", "split": "train"}')
    (tmp_path / "a.npy").write_text("no array")
    with pytest.raises(UserError, match=r"--images region_files: none of the first 1 files has features .* a.npy: it is text"):
        prepare(tmp_path / "manifest.jsonl", tmp_path / "s", PrepareSettings(images="region_files"), workers=1, device="cpu")
    with pytest.raises(UserError, match=r"set --extractor-option audio.frame_rate_hz=50"):
        prepare(tmp_path / "manifest.jsonl", tmp_path / "s", PrepareSettings(speech="frame_files"), workers=1, device="cpu")
    options = {"audio": {"frame_rate_hz": 50.0}}
    with pytest.raises(UserError, match="--speech frame_files: the manifest names no such files: leave it out"):
        settings = PrepareSettings(speech="frame_files", extractor_options=options)
        prepare(tmp_path / "manifest.jsonl", tmp_path / "s", settings, workers=1, device="cpu")
