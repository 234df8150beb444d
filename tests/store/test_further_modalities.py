"""Stores with modalities besides text, image and audio: they describe themselves, and every store command reads them."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from opt_ds.errors import UserError
from opt_ds.store import FeatureStore, inspect_store, open_store, set_codes, verify_store
from opt_ds.store.convert import copy_store
from opt_ds.store.further import FurtherModality, StoredColumn
from opt_ds.store.index import INDEX_FILE
from opt_ds.store.lengths import draw_lengths, shard_lengths
from opt_ds.store.near_duplicates import same_images
from opt_ds.store.processor_files import check_fingerprints, copy_processor_files
from opt_ds.store.show import describe_sample, draw_sample
from opt_ds.store.split import split_by_list, split_by_ratio
from opt_ds.store.update import Arrays, rewrite_shards
from opt_ds.store.writer import SampleItem, restore_journals
from tests.store.fixed_store import contents, hashes, new_writer, write
from tests.store.further_store import FURTHER, SMELL, TOUCH, agree, further_contents, touch, write_store


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "template")


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


def everything(store: FeatureStore) -> list[Any]:
    """The content of all samples."""
    found: list[Any] = []
    for index, rows in enumerate(store.rows.tolist()):
        text, image, audio, *further = rows
        found.append([store.sample_id(index), rows, store.caption(text) if text >= 0 else None])
        found += [store.regions(image).features.tolist()] if image >= 0 else []
        found += [store.frames(audio).tolist()] if audio >= 0 else []
        for name, row in zip(store.modalities[3:], further, strict=True):
            columns = store.columns(name, row) if row >= 0 else {}
            found.append({column: (str(array.dtype), array.tolist()) for column, array in columns.items()})
    return found


def test_what_was_written_is_read(store: Path) -> None:
    opened = open_store(store)
    assert opened.modalities == opened.description.modalities == ("text", "image", "audio", "touch", "smell")
    assert opened.description.further == FURTHER
    assert opened.rows.tolist() == [
        [0, 0, 0, 0, -1], [1, -1, 0, -1, 0], [-1, 1, 1, 1, -1], [2, 2, -1, 1, 0],
        [3, -1, -1, 4, 2], [-1, -1, -1, 2, -1], [-1, 3, -1, 3, 1],
    ]  # fmt: skip
    assert opened.lengths("touch").tolist() == [2, 1, 2, 1, 2] and opened.lengths("touch").dtype == "int32"
    assert opened.lengths("text") is opened.text_lengths and opened.lengths("image") is opened.region_counts
    for row, seed in enumerate((0, 1, 0, 1, 2)):
        found, made = opened.columns("touch", row), touch(seed)
        assert list(found) == list(TOUCH.columns)
        for name, stored in TOUCH.columns.items():
            assert np.array_equal(found[name], made[name]) and found[name].dtype == stored.dtype
            assert found[name].base is not None and not found[name].flags.writeable, "a view of the file"
    assert opened.read_ahead("touch", 0) == 2 * 3 * 2
    assert opened.split_subsets("train").sum() == opened.description.split_counts["train"]
    assert opened.split_subsets("valid").tolist() == [int(subset == 0b11011) for subset in range(32)]
    assert not opened.all_have(3) and not opened.all_have(7)
    train = [opened.columns("touch", row)["features"] for row in (0, 1, 2, 3, 4)]
    assert np.allclose(opened.description.statistics["touch"].mean, np.concatenate(train).mean(0, dtype="float64"))
    assert opened.description.statistics["touch"].count == 8
    with pytest.raises(IndexError):
        opened.columns("touch", 5)


def test_it_reads_the_same_without_an_index_pickled_compressed_and_back(store: Path, tmp_path: Path) -> None:
    content = everything(FeatureStore(store))
    assert everything(pickle.loads(pickle.dumps(FeatureStore(store)))) == content
    packed = copy_store(store, tmp_path / "packed", "gzip")
    assert packed.further == FURTHER and inspect_store(tmp_path / "packed").failures == []
    assert everything(open_store(tmp_path / "packed")) == content
    copy_store(tmp_path / "packed", tmp_path / "plain", None)
    assert hashes(tmp_path / "plain") == hashes(store)
    (store / INDEX_FILE).unlink()
    assert everything(FeatureStore(store)) == content
    verify_store(store)
    assert hashes(store) == hashes(tmp_path / "plain"), "the index is made again"


def put(name: str, place: Any, value: float) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][place] = value

    return change


def swap(name: str, array: np.ndarray | None) -> Callable[[h5py.File], None]:
    """Replace a dataset, or remove it."""

    def change(file: h5py.File) -> None:
        if name in file:
            del file[name]
        if array is not None:
            file[name] = array

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("touch/features", put("touch/features", (2, 1), np.nan), "NaN or infinite, first in row 2"),
        ("touch/forces", put("touch/forces", (3, 1, 0), np.inf), "NaN or infinite, first in row 3"),
        ("touch/offsets", put("touch/offsets", 1, 99), "falls after item 1"),
        ("touch/offsets", put("touch/offsets", -1, 4), "does not run from 0 to 5"),
        ("touch/offsets", put("touch/offsets", 1, 0), "item 0 is empty"),
        ("smell/offsets", put("smell/offsets", 0, 1), "does not run from 0 to 3"),
        ("smell/features", put("smell/features", (0, 0), -np.inf), "NaN or infinite, first in row 0"),
        ("samples/rows", put("samples/rows", (0, 3), 3), "sample 0: no touch row 3"),
        ("samples/rows", put("samples/rows", (0, 4), -2), "sample 0: no smell row -2"),
        ("samples/rows", put("samples/rows", (1, 3), -1), "sample 1 has no modality at all"),
        ("samples/rows", swap("samples/rows", np.zeros((3, 3), "int64")), "shape [3, 3], not [3, 5]"),
        ("touch/finger", swap("touch/finger", None), "missing"),
        ("touch/finger", swap("touch/finger", np.zeros(5, "int16")), "dtype int16, not uint8"),
        ("touch/finger", swap("touch/finger", np.zeros(4, "uint8")), "shape [4], not [5]"),
        ("touch/forces", swap("touch/forces", np.zeros((5, 2), "float32")), "shape [5, 2], not [5, 2, 2]"),
        ("touch/time_offsets", swap("touch/time_offsets", np.zeros(6, "int64")), "shape [6], not [5]"),
        ("touch/features", swap("touch/features", np.zeros((5, 4), "float16")), "shape [5, 4], not [5, 3]"),
        ("touch/more", swap("touch/more", np.zeros(5, "uint8")), "unknown dataset"),
        ("taste/features", swap("taste/features", np.zeros((5, 3), "float16")), "unknown dataset"),
    ],
)  # fmt: skip
def test_damage_is_named_by_shard_and_dataset(store: Path, name: str, change: Callable[[h5py.File], None], message: str) -> None:
    with h5py.File(store / "shard-00001.h5", "r+") as file:
        change(file)
    assert [failure.partition(":")[0] for failure in inspect_store(store).failures] == ["shard-00001.h5"], "size or checksum"
    agree(store)
    (store / INDEX_FILE).unlink()
    failures = inspect_store(store).failures
    assert any(failure.startswith(f"shard-00001.h5: {name}: ") and message in failure for failure in failures), failures
    with pytest.raises(UserError) as error:
        verify_store(store)
    assert str(error.value).startswith(f"{store}/shard-00001.h5: {name}: ") and "\n" not in str(error.value)


def test_a_changed_value_changes_the_statistics_and_every_column_is_in_the_checksum(store: Path) -> None:
    for name, place in (("touch/finger", 1), ("touch/time_offsets", 0), ("touch/forces", (0, 0, 1)), ("touch/features", (0, 0))):
        with h5py.File(store / "shard-00001.h5", "r+") as file:
            file[name][place] = 9
        assert inspect_store(store).failures == ["shard-00001.h5: checksum differs from store.json's"]
        agree(store)
        wrong = ["store.json: statistics.touch: dimension 0 differs from the features"] if name == "touch/features" else []
        assert inspect_store(store).failures == wrong
    agree(store, lambda fields: fields["statistics"].pop("touch"))
    assert inspect_store(store).failures == ["store.json: statistics.touch: not 3 means and standard deviations"]


def test_a_wrong_index_is_found(store: Path) -> None:
    with h5py.File(store / INDEX_FILE, "r+") as file:
        assert [name for name in file if name.endswith("lengths")] == ["smell_lengths", "text_lengths", "touch_lengths"]
        file["touch_lengths"][1] += 1
    assert inspect_store(store).failures == [f"{INDEX_FILE}: touch_lengths differ from the shards: remove it"]
    with h5py.File(store / INDEX_FILE, "r+") as file:
        del file["touch_lengths"]
    assert FeatureStore(store).lengths("touch").tolist() == [2, 1, 2, 1, 2], "made again"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"finger": None}, r"columns features, forces, time_offsets, not features, forces, finger, time_offsets"),
        ({"more": np.zeros(2)}, r"columns features, forces, finger, time_offsets, more, not features"),
        ({"features": np.zeros((2, 4))}, r"features of shape \[2, 4\], not \[N, 3\]"),
        ({"features": np.zeros((0, 3))}, "features are empty"),
        ({"features": np.full((2, 3), 1e5)}, "features: 100000 is beyond float16"),
        ({"features": np.full((2, 3), np.nan)}, "features: NaN or infinite, first in row 0"),
        ({}, "ndarray, not a dict of columns"),
        ({"features": [[0.0] * 3] * 2}, "columns that are no NumPy arrays"),
        ({"forces": np.full((2, 2, 2), 1e39)}, r"forces: 1e\+39 is beyond float32"),
        ({"forces": np.zeros((1, 2, 2))}, r"forces of shape \[1, 2, 2\], not \[2, 2, 2\]"),
        ({"finger": np.array([0, 256])}, "finger: values do not fit uint8"),
        ({"finger": np.array([-1, 0])}, "finger: values do not fit uint8"),
        ({"finger": np.zeros(2)}, "finger of dtype float64, not integers"),
        ({"finger": np.array(["a", "b"])}, "finger of dtype <U1, not integers"),
        ({"time_offsets": np.zeros((2, 1), "int64")}, r"time_offsets of shape \[2, 1\], not \[2\]"),
        ({"time_offsets": np.array([2**63, 0], "uint64")}, "time_offsets: values do not fit int64"),
    ],
)
def test_the_writer_refuses_what_a_store_cannot_hold(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    writer = new_writer(tmp_path / "s", further=FURTHER)
    content = further_contents()[1]
    columns = {name: array for name, array in {**content.further["touch"][0], **row}.items() if array is not None}
    content.further["touch"][0] = columns if row else np.zeros((2, 3), "float16")  # type: ignore[assignment]
    with pytest.raises(UserError, match=f'sample "sämple5": touch: {reason}') as error:
        writer.write_shard(0, content)
    assert "\n" not in str(error.value) and not list((tmp_path / "s").glob("shard-*"))


def test_rows_and_modalities_of_a_sample_must_be_the_stores(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "s", further=FURTHER)
    content = further_contents()[0]
    for rows, reason in (
        ((0, 0, 0), "has 3 rows for 5 modalities"),
        ((-1,) * 5, "has no modality at all"),
        ((-1, -1, -1, 2, -1), "no touch row 2"),
    ):
        content.samples[0] = SampleItem("odd", rows, "g", "train")
        with pytest.raises(UserError, match=f'sample "odd".*{reason}'):
            writer.write_shard(0, content)
    content.further["taste"] = []
    with pytest.raises(UserError, match='items of "taste", which is no modality of the store'):
        writer.write_shard(0, content)


def test_an_unfinished_store_resumes_only_with_the_same_modalities(template: Path, tmp_path: Path) -> None:
    shards = further_contents()
    path, extractors = tmp_path / "s", FeatureStore(template).description.extractors
    first = new_writer(path, further=FURTHER, extractors=extractors)
    first.write_shard(0, shards[0])
    for further in (None, {"touch": TOUCH}, {"smell": SMELL, "touch": TOUCH}, {"touch": SMELL, "smell": SMELL}):
        with pytest.raises(UserError, match="unfinished store of other inputs or settings"):
            new_writer(path, further=further)
    second = new_writer(path, further=FURTHER, extractors=extractors)
    assert second.has_shard(0) and not second.has_shard(1)
    for index in (1, 2):
        second.write_shard(index, shards[index])
    second.finish(3)
    assert hashes(path) == hashes(template)
    description = FeatureStore(path).description
    restore_journals(path, description, {index: {} for index in range(3)})
    (path / "store.json").unlink()
    new_writer(path, further=FURTHER, extractors=extractors, key=description.preparation_key).finish(3)
    assert hashes(path) == hashes(template)


def test_inspect_lengths_and_show(store: Path, tmp_path: Path) -> None:
    inspection = inspect_store(store)
    assert inspection.failures == []
    summary = dict(inspection.summary)
    assert summary["touch"] == "5, 1.6 readings each of 3 dimensions; columns features, forces, finger, time_offsets"
    assert summary["smell"] == "3, 1.3 sniffs each of 2 dimensions; columns features"
    opened = FeatureStore(store)
    files = [store / shard.file for shard in opened.description.shards]
    lengths = shard_lengths(files, opened.modalities)
    assert {name: array.tolist() for name, array in lengths.items()} == {
        name: opened.lengths(name).tolist() for name in opened.modalities
    }
    draw_lengths(lengths, tmp_path / "lengths.png", opened.description.units)
    assert Image.open(tmp_path / "lengths.png").size == (2000, 320)
    lines = dict(describe_sample(opened, 2))
    assert lines["touch readings"] == "1" and lines["  finger"] == "1" and lines["  time_offsets"] == "6"
    assert lines["  forces"].startswith("float32 [1, 2, 2] of mean 0.500")
    assert "smell sniffs" not in lines
    assert dict(describe_sample(opened, 5))["touch readings"] == "2"
    for sample, panels in ((0, 4), (5, 1), (3, 4)):
        draw_sample(opened, sample, tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").size == (500 * panels, 500)


def test_splits_and_image_codes_keep_further_modalities(store: Path, tmp_path: Path) -> None:
    content, images = everything(FeatureStore(store)), same_images(FeatureStore(store))
    assert len(images.near) == 4
    (tmp_path / "list.csv").write_text("sämple5,valid\nsämple3,train\n", encoding="utf-8")
    description = split_by_list(store, tmp_path / "list.csv")
    assert description.further == FURTHER
    assert everything(open_store(store)) == content
    rows = [row for row in range(5) if row != 2]  # row 2 is that of sample 5 alone
    features = np.concatenate([FeatureStore(store).columns("touch", row)["features"] for row in rows])
    assert np.allclose(description.statistics["touch"].mean, features.mean(0, dtype="float64"))
    split_by_ratio(store, {"train": 0.7, "valid": 0.3})
    set_codes(store, np.arange(4 * 64).reshape(4, 64) % 5, {"name": "fixed", "num_codes": 8})
    assert everything(open_store(store)) == content
    assert inspect_store(store).failures == []


def test_a_modality_is_added_to_a_finished_store_and_replaced_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    writer = new_writer(path)
    write(writer, contents())
    writer.finish(3)
    before, bytes_before = everything(FeatureStore(path)), hashes(path)
    taste = FurtherModality(item="tastes", columns={"features": StoredColumn(dtype="float16", width=(1,))})

    def add(index: int, arrays: Arrays) -> Arrays:
        count = len(arrays["samples/rows"])
        rows = np.concatenate([arrays["samples/rows"], np.arange(count)[:, None]], axis=1)
        own = {"taste/offsets": np.arange(count + 1), "taste/features": np.ones((count, 1), "float16")}
        return {**arrays, "samples/rows": rows, **own}

    def remove(index: int, arrays: Arrays) -> Arrays:
        kept = {name: array for name, array in arrays.items() if not name.startswith("taste/")}
        return {**kept, "samples/rows": np.ascontiguousarray(arrays["samples/rows"][:, :3])}

    description = rewrite_shards(FeatureStore(path), add, dict, new_further={"taste": taste})
    assert description.modalities == ("text", "image", "audio", "taste") and description.statistics["taste"].mean == [1]
    assert inspect_store(path).failures == []
    assert FeatureStore(path).all_have(3) and FeatureStore(path).lengths("taste").tolist() == [1] * 6
    with pytest.raises(UserError, match='"codes" is a name of the store\'s own'):
        rewrite_shards(FeatureStore(path), add, dict, new_further={"codes": taste})
    rewrite_shards(FeatureStore(path), remove, dict, new_further={})
    assert everything(open_store(path)) == before
    assert hashes(path)["shard-00000-r2.h5"] == bytes_before["shard-00000.h5"]


def test_a_store_of_another_extractor_of_a_further_modality_is_refused(store: Path, tmp_path: Path, logged: list[str]) -> None:
    copy_processor_files(FeatureStore(store), tmp_path / "processor")
    check_fingerprints(tmp_path / "processor", FeatureStore(store), False)
    agree(store, lambda fields: fields["extractors"]["touch"].update(version="2"))
    with pytest.raises(UserError, match=r"its touch features come from another extractor .*\(fixed 2, not fixed\)"):
        check_fingerprints(tmp_path / "processor", FeatureStore(store), False)
    plain = tmp_path / "plain"
    writer = new_writer(plain, extractors={name: {"name": "fixed"} for name in ("text", "image", "audio", "codes")})
    write(writer, contents())
    writer.finish(3)
    check_fingerprints(tmp_path / "processor", FeatureStore(plain), False)
    assert not logged, "a modality that only one of the two has is not compared"
