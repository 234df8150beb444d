"""Stores compressed and uncompressed again: the same content; and one sample shown in full."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opt_ds.errors import UserError
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.convert import copy_store
from opt_ds.store.show import describe_sample, draw_sample, find_sample
from opt_ds.store.synthetic import write_synthetic_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_synthetic_store(tmp_path / "s", 20, samples_per_shard=8, missing=0.3)
    (tmp_path / "s" / "notes").mkdir()
    (tmp_path / "s" / "notes" / "mine.txt").write_text("kept")
    return tmp_path / "s"


def test_there_and_back_is_the_same_store(store: Path, tmp_path: Path) -> None:
    packed = copy_store(store, tmp_path / "packed", "gzip")
    assert packed.compression == "gzip"
    assert inspect_store(tmp_path / "packed").failures == []
    ours, theirs = FeatureStore(store), FeatureStore(tmp_path / "packed")
    assert np.array_equal(ours.rows, theirs.rows)
    assert all(np.array_equal(ours.frames(row), theirs.frames(row)) for row in range(len(ours.frame_counts)))
    plain = copy_store(tmp_path / "packed", tmp_path / "plain", None)
    assert plain == ours.description
    for file in store.rglob("*"):
        if file.is_file() and file.name != "verified.json":
            assert (tmp_path / "plain" / file.relative_to(store)).read_bytes() == file.read_bytes()
    (store / ".dvae.7.tmp").mkdir()
    copy_store(store, tmp_path / "tidy", None)
    assert not (tmp_path / "tidy" / ".dvae.7.tmp").exists(), "what a killed process left is not copied"
    with pytest.raises(UserError, match="it exists already"):
        copy_store(store, tmp_path / "plain", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "plain", "s", "tidy"]


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_damage_is_not_copied(store: Path, tmp_path: Path) -> None:
    flip_a_byte(store / "shard-00001.h5")
    with pytest.raises(UserError, match=r"shard-00001\.h5: checksum differs"):
        copy_store(store, tmp_path / "packed", "gzip")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_copy_that_fails_leaves_nothing(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("opt_ds.store.convert.write_datasets", full)
    with pytest.raises(OSError, match="No space"):
        copy_store(store, tmp_path / "packed", "gzip")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_sample_is_shown_in_full(store: Path, tmp_path: Path) -> None:
    opened = FeatureStore(store)
    whole = next(index for index in range(20) if (opened.rows[index] >= 0).all())
    assert find_sample(opened, f"sample{whole}") == find_sample(opened, f"#{whole}") == whole
    lines = dict(describe_sample(opened, whole))
    assert lines["id"] == f"sample{whole}"
    assert lines["caption"] == lines["decoded"] == opened.caption(opened.rows[whole, 0])
    assert lines["frames"].startswith(f"{len(opened.frames(opened.rows[whole, 2]))} (")
    assert len(lines["image codes"].split()) == 64
    assert all(describe_sample(opened, index) for index in range(20)), "every subset of modalities"
    text_alone = next(index for index in range(20) if (opened.rows[index] >= 0).tolist() == [True, False, False])
    for index, image, panels in ((whole, None, 3), (whole, Image.new("RGB", (60, 40)), 3), (text_alone, None, 1)):
        draw_sample(opened, index, tmp_path / "a.png", image)
        assert Image.open(tmp_path / "a.png").size == (500 * panels, 500)
    with pytest.raises(UserError, match=r'no sample "samlpe1" .did you mean "sample1"'):
        find_sample(opened, "samlpe1")
