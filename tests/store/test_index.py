"""Test the index: equal to the shards, bound to their content, replaced by an update; maps hold no file open."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from opt_ds.store import FeatureStore, inspect_store, set_codes, verify_store
from opt_ds.store.convert import copy_store
from opt_ds.store.index import INDEX_FILE, build_index, read_index
from opt_ds.store.mapped import MappedFile
from opt_ds.store.synthetic import write_synthetic_store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_synthetic_store(tmp_path / "s", 50, missing=0.4, samples_per_shard=8, splits={"train": 0.7, "valid": 0.3})
    return tmp_path / "s"


def everything(store: FeatureStore) -> list[np.ndarray]:
    """All items of all samples, in order."""
    found: list[np.ndarray] = []
    for index, (text, image, audio) in enumerate(store.rows.tolist()):
        found.append(np.frombuffer(store.sample_id(index).encode(), "uint8"))
        found += [store.text(text)] if text >= 0 else []
        found += [*store.regions(image), store.codes(image), store.pixels(image)] if image >= 0 else []
        found += [store.frames(audio)] if audio >= 0 else []
    return found


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_with_and_without_an_index_a_store_reads_the_same(path: Path) -> None:
    indexed = FeatureStore(path)
    assert read_index(path, indexed.description) is not None
    items = everything(indexed)
    split = {name: indexed.split_samples(name).tolist() for name in ("train", "valid")}
    (path / INDEX_FILE).unlink()
    bare = FeatureStore(path)
    assert same(everything(bare), items)
    assert {name: bare.split_samples(name).tolist() for name in split} == split
    found = indexed.index.datasets()
    assert all(np.array_equal(array, found[name]) for name, array in bare.index.datasets().items())
    assert sorted(split["train"] + split["valid"]) == list(range(50))
    have = (indexed.rows >= 0) @ [1, 2, 4]
    for name, samples in split.items():
        assert indexed.split_subsets(name).tolist() == [(have[samples] == subset).sum() for subset in range(8)]
    verify_store(path)  # training writes the index that is missing
    assert read_index(path, bare.description) is not None
    (path / INDEX_FILE).unlink()
    verify_store(path)  # also if it has verified the store before
    assert read_index(path, bare.description) is not None


def test_shards_are_opened_without_hdf5(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(path)
    assert store.index.rows.shape == (50, 3)
    monkeypatch.setattr(h5py, "File", None)
    assert everything(store)


def test_an_index_of_another_content_is_not_used(path: Path, tmp_path: Path) -> None:
    before = read_index(path, FeatureStore(path).description)
    images = len(before.region_counts)
    old = (path / INDEX_FILE).read_bytes()
    set_codes(path, np.ones((images, 64), "uint16"), {"name": "dvae", "num_codes": 64})
    assert (FeatureStore(path).codes(0) == 1).all()
    assert inspect_store(path).failures == []
    (path / INDEX_FILE).write_bytes(old)  # as if the update had been killed, or the file been copied from elsewhere
    assert read_index(path, FeatureStore(path).description) is None
    assert (FeatureStore(path).codes(0) == 1).all()
    assert any("no index.h5 of this store" in note for note in inspect_store(path).notes)
    copy_store(path, tmp_path / "packed", "gzip")
    packed = FeatureStore(tmp_path / "packed")
    assert read_index(packed.path, packed.description) is not None
    assert same(everything(packed), everything(FeatureStore(path)))


def test_a_damaged_index_is_found_or_not_used(path: Path) -> None:
    description = FeatureStore(path).description
    whole = (path / INDEX_FILE).read_bytes()
    (path / INDEX_FILE).write_bytes(whole[:-2000])
    assert read_index(path, description) is None
    (path / INDEX_FILE).write_bytes(whole)
    with h5py.File(path / INDEX_FILE, "r+") as file:
        file["groups"][3] += 1
    assert inspect_store(path).failures == ["index.h5: groups differ from the shards: remove it"]


def test_equal_stores_have_equal_indices(path: Path, tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "t", 50, missing=0.4, samples_per_shard=8, splits={"train": 0.7, "valid": 0.3})
    assert (tmp_path / "t" / INDEX_FILE).read_bytes() == (path / INDEX_FILE).read_bytes()


def test_maps_hold_no_file_open_and_views_outlive_them(path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    store = FeatureStore(path)
    frames = everything(store)[-1]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    content = frames.copy()
    del store
    for file in path.glob("*.h5"):
        file.unlink()
    assert np.array_equal(frames, content)
    (path / "empty").touch()
    assert MappedFile(path / "empty").bytes.size == 0
    with pytest.raises(FileNotFoundError):
        MappedFile(path / "gone")


def test_reading_ahead_counts_bytes_and_changes_nothing(path: Path) -> None:
    store, index = FeatureStore(path), 0
    regions, frames = store.regions(index), store.frames(index)
    assert store.read_ahead("image", index) == regions.features.nbytes
    assert store.read_ahead("audio", index) == frames.nbytes
    store.release_pages()
    assert np.array_equal(store.frames(index), frames)
    assert build_index(path, store.description).rows.tolist() == store.rows.tolist()
