"""Test reading: written data comes back, through shards, processes and pickles; broken files are refused by name."""

import json
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ds.errors import RunError, UserError
from opt_ds.store import FeatureStore
from opt_ds.store.schema import Dims
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.store.tokenizer import SPECIAL_TOKENS, build_wordpiece, save_wordpiece
from opt_ds.store.writer import ImageItem, SampleItem, ShardContent, StoreWriter, TextItem


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "ragged"
    write_synthetic_store(path, 50, missing=0.3, samples_per_shard=16, splits={"train": 0.6, "valid": 0.4})
    return path


def write_known_store(path: Path, shards: list[ShardContent]) -> None:
    save_wordpiece(build_wordpiece([*SPECIAL_TOKENS.values(), "a"]), path.with_name("tok"))
    dims = Dims(image_feature_dim=3, image_num_classes=9, audio_feature_dim=2, audio_frame_rate_hz=50, vocab_size=6)
    writer = StoreWriter(
        path,
        dims=dims,
        split_names=["train", "valid"],
        splits_source="manifest",
        extractors={},
        tokenizer_folder=path.with_name("tok"),
        label_names=["cat", "dog"],
    )
    for index, shard in enumerate(shards):
        writer.write_shard(index, shard)
    writer.finish(len(shards))


def image(value: float, regions: int) -> ImageItem:
    boxes = np.tile(np.array([0, 0, 1, 1, 1, 1, 1], "float32"), (regions, 1))
    return ImageItem(np.full((regions, 3), value), boxes, np.full(regions, value), np.full(regions, 0.5))


def test_every_item_comes_back_under_its_global_row(tmp_path: Path) -> None:
    path = tmp_path / "known"
    first = ShardContent(
        samples=[
            SampleItem("é-1", (0, 0, -1), "g", "train", ["dog", "cat"]),
            SampleItem("two", (1, 0, 0), "g", "valid"),  # shares the image
        ],
        texts=[TextItem(np.array([5, 5]), "a A"), TextItem(np.array([5]), "ä")],
        images=[image(1, 2)],
        audios=[np.full((4, 2), 7.0)],
    )
    second = ShardContent(
        samples=[SampleItem("three", (-1, 0, 1), "h", "train", ["cat"])],
        images=[image(2, 5)],
        audios=[np.ones((1, 2)), np.zeros((3, 2))],
    )
    write_known_store(path, [first, second])
    store = FeatureStore(path)
    assert store.rows.tolist() == [[0, 0, -1], [1, 0, 0], [-1, 1, 2]]
    assert store.text_lengths.tolist() == [2, 1]
    assert store.region_counts.tolist() == [2, 5]
    assert store.frame_counts.tolist() == [4, 1, 3]
    assert [store.sample_id(index) for index in range(3)] == ["é-1", "two", "three"]
    assert [store.labels(index) for index in range(3)] == [["dog", "cat"], [], ["cat"]]
    assert store.groups[0] == store.groups[1] != store.groups[2]
    assert store.split_samples("train").tolist() == [0, 2]
    assert store.text(0).tolist() == [5, 5]
    assert [store.caption(row) for row in range(2)] == ["a A", "ä"]
    assert store.regions(1).features.shape == (5, 3)
    assert (store.regions(1).features == 2).all()
    assert store.region_features(0).tolist() == store.regions(0).features.tolist()
    assert store.regions(1).labels.tolist() == [2] * 5
    assert store.frames(2).shape == (3, 2)
    assert not store.has_codes
    assert not store.has_pixels
    assert store.name == "known"
    # Only the train split's rows count, each once: 2 regions of 1 and 5 of 2; of the frames only row 2's zeros.
    assert store.description.statistics["image"].mean == pytest.approx([12 / 7] * 3)
    assert store.description.statistics["audio"].count == 3
    with pytest.raises(UserError, match="no image codes"):
        store.codes(0)
    with pytest.raises(IndexError):
        store.frames(3)


def test_views_are_mapped_not_copied_and_typed(store_path: Path) -> None:
    store = FeatureStore(store_path)
    for view, dtype in (
        (store.text(0), "int32"),
        (store.regions(0).features, "float16"),
        (store.region_features(0), "float16"),
        (store.regions(0).boxes, "float32"),
        (store.regions(0).labels, "int16"),
        (store.frames(0), "float16"),
        (store.codes(0), "uint16"),
        (store.pixels(0), "uint8"),
    ):
        assert view.dtype == dtype
        assert not view.flags.owndata
        assert view.flags.aligned
        assert not view.flags.writeable


@settings(max_examples=8, deadline=None)
@given(
    samples=st.integers(1, 20),
    shard=st.integers(1, 7),
    missing=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 99),
)
def test_compressed_and_plain_stores_read_the_same(
    tmp_path_factory: pytest.TempPathFactory, samples: int, shard: int, missing: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    options = {"seed": seed, "missing": missing, "samples_per_shard": shard}
    write_synthetic_store(folder / "plain", samples, **options)
    write_synthetic_store(folder / "gzip", samples, compression="gzip", **options)
    plain, packed = FeatureStore(folder / "plain"), FeatureStore(folder / "gzip")
    assert (plain.rows == packed.rows).all()
    assert all((row >= 0).any() for row in plain.rows)
    for row in range(len(plain.region_counts)):
        assert len(plain.regions(row).features) == plain.region_counts[row]
        for one, other in zip(plain.regions(row), packed.regions(row), strict=True):
            assert (one == other).all()
        assert (plain.codes(row) == packed.codes(row)).all()
    for row in range(len(plain.frame_counts)):
        assert (plain.frames(row) == packed.frames(row)).all()
    for row in range(len(plain.text_lengths)):
        assert plain.text(row).tolist() == packed.text(row).tolist()


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_synthetic_store(tmp_path / name, 12, samples_per_shard=5)
    assert {file.name: file.read_bytes() for file in (tmp_path / "one").glob("shard-*.h5")} == {
        file.name: file.read_bytes() for file in (tmp_path / "two").glob("shard-*.h5")
    }
    assert FeatureStore(tmp_path / "one").fingerprint == FeatureStore(tmp_path / "two").fingerprint


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_an_opened_store_crosses_fork_and_spawn(tmp_path: Path, method: str, compression: str | None) -> None:
    write_synthetic_store(tmp_path / "s", 10, samples_per_shard=4, compression=compression)
    store = FeatureStore(tmp_path / "s")
    here = [store.frames(row).copy() for row in range(10)]  # opens the files in this process first
    with multiprocessing.get_context(method).Pool(2) as pool:
        there = pool.map(store.frames, range(10), chunksize=1)
    assert all((one == other).all() for one, other in zip(here, there, strict=True))


def test_a_pickle_is_small_and_reads_on(store_path: Path) -> None:
    store = FeatureStore(store_path)
    store.frames(0)
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert (pickle.loads(data).frames(0) == store.frames(0)).all()


def test_the_tokenizer_is_hugging_faces_and_local(store_path: Path) -> None:
    store = FeatureStore(store_path)
    tokenizer = store.tokenizer()
    assert tokenizer.decode(store.text(3)) == store.caption(3)
    assert len(tokenizer) == store.description.dims.vocab_size
    assert tokenizer.mask_token_id == store.description.tokenizer.mask_id
    assert tokenizer("W3", add_special_tokens=False).input_ids == [8]


def test_broken_stores_are_refused_by_name(store_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no feature store there"):
        FeatureStore(tmp_path)
    write_synthetic_store(tmp_path / "s", 8, samples_per_shard=4)
    shard, index = tmp_path / "s" / "shard-00001.h5", tmp_path / "s" / "store.json"
    whole, text = shard.read_bytes(), index.read_text()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"shard-00001.h5: shard is truncated"):
        FeatureStore(tmp_path / "s")
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001.h5: shard is missing"):
        FeatureStore(tmp_path / "s")
    shard.write_bytes(whole)
    for broken, message in (
        (text[:-20], "not readable as JSON"),
        (json.dumps({**json.loads(text), "schema_version": 99}), "schema version 99, this opt_ds reads version 1"),
        (json.dumps({**json.loads(text), "num_samples": "many"}), "field num_samples"),
        ("[]", "schema version None"),
    ):
        index.write_text(broken)
        with pytest.raises(UserError, match=message) as error:
            FeatureStore(tmp_path / "s")
        assert "\n" not in str(error.value)
    index.write_text(text)
    with pytest.raises(UserError, match=r'no split "trian" \(did you mean "train"\?\)'):
        FeatureStore(tmp_path / "s").split_samples("trian")


def test_a_shard_that_is_cut_off_while_it_is_read_is_named(store_path: Path, tmp_path: Path) -> None:
    """Reading mapped bytes beyond the end of a truncated file would end the process by SIGBUS, without a message."""
    copy = tmp_path / "store"
    shutil.copytree(store_path, copy)
    store = FeatureStore(copy)
    store.text(0)
    shard = copy / store.description.shards[0].file
    os.truncate(shard, shard.stat().st_size // 2)
    time.sleep(0.3)
    with pytest.raises(RunError, match=rf"{shard.name}: was truncated from \d+ to \d+ bytes"):
        store.text(0)
