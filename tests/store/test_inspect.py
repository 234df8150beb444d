"""Inspection and verification: every kind of damage is found, and named by shard and dataset."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from opt_ds.errors import UserError
from opt_ds.store import inspect_store, verify_store
from opt_ds.store import verify as verify_module
from opt_ds.store.files import file_sha256
from opt_ds.store.schema import StoreDescription
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.store.verify import VERIFIED_FILE


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "template"
    write_synthetic_store(path, 12, missing=0.2, samples_per_shard=6)
    return path


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


def damage(store: Path, name: str, change: Callable[[np.ndarray], None], *, repair_checksums: bool = True) -> None:
    """Change a dataset of the second shard; by default store.json is made to agree, as if it had been written so."""
    file = store / "shard-00001.h5"
    with h5py.File(file, "r+") as shard:
        array = shard[name][:]
        change(array)
        shard[name][:] = array
    if repair_checksums:
        describe_anew(store)


def describe_anew(store: Path) -> None:
    """Make store.json agree with the second shard."""
    file = store / "shard-00001.h5"
    fields = json.loads((store / "store.json").read_text())
    fields["shards"][1] |= {"sha256": file_sha256(file), "bytes": file.stat().st_size}
    description = StoreDescription.model_validate(fields).with_fingerprint()
    (store / "store.json").write_text(description.model_dump_json())


def test_a_whole_store_passes_with_a_summary(template: Path) -> None:
    inspection = inspect_store(template)
    assert inspection.failures == []
    summary = dict(inspection.summary)
    assert summary["samples"] == "12"
    assert summary["splits"] == "train 10, valid 2"


def assign(index: int | tuple[int, ...], value: float) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[index] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image/features", assign((3, 2), np.nan), "NaN or infinite, first in row 3"),
        ("audio/features", assign((5, 0), np.inf), "NaN or infinite, first in row 5"),
        ("image/boxes", assign((0, 0), np.nan), "NaN or infinite"),
        ("image/boxes", assign((0, 2), 1.5), "value 1.5 in row 0 is outside"),
        ("image/boxes", assign((2, 6), 0.0), "row 2: width, height or area"),
        ("image/labels", assign(4, 50), "value 50 in row 4 is outside 0..49"),
        ("image/labels", assign(4, -1), "value -1 in row 4"),
        ("image/scores", assign(1, 1.5), "value 1.5 in row 1"),
        ("image/codes", assign((1, 63), 64), "value 64 in row 1 is outside 0..63"),
        ("text/tokens", assign(0, 200), "value 200 in row 0 is outside 0..199"),
        ("text/offsets", assign(1, 10**6), "falls after item"),
        ("text/offsets", assign(0, 1), "does not run from 0"),
        ("audio/offsets", assign(-1, 1), "does not run from 0"),
        ("samples/rows", assign((2, 1), 99), "sample 2: no image row 99"),
        ("samples/rows", assign((2, 0), -2), "sample 2: no text row -2"),
        ("samples/rows", assign(3, -1), "sample 3 has no modality"),
        ("samples/split", assign(0, 7), "value 7 in row 0 is outside 0..1"),
        ("samples/labels", assign(0, 5), "value 5 in row 0"),
        ("samples/group", assign(0, -5), "value -5 in row 0"),
    ],
)
def test_damage_is_named_by_shard_and_dataset(
    store: Path, name: str, change: Callable[[np.ndarray], None], message: str
) -> None:
    damage(store, name, change)
    failures = inspect_store(store).failures
    assert any(failure.startswith(f"shard-00001.h5: {name}: ") and message in failure for failure in failures), failures
    assert not any("\n" in failure or "shard-00000" in failure for failure in failures)


def test_checksums_ids_counts_and_tokenizer(store: Path) -> None:
    damage(store, "samples/id", assign(0, ord("X")), repair_checksums=False)
    assert inspect_store(store).failures == ["shard-00001.h5: checksum differs from store.json's"]
    with pytest.raises(UserError, match=r"shard-00001.h5: checksum differs"):
        verify_store(store)

    def repeat(array: np.ndarray) -> None:
        array[: len("sample7")] = np.frombuffer(b"sample7", "uint8")  # in place of "sample6"

    damage(store, "samples/id", repeat)
    assert inspect_store(store).failures == ["shard-00001.h5: samples/id: repeated ids"]
    damage(store, "samples/split", assign(slice(None), 0))
    assert "store.json: split_counts differ from samples/split" in inspect_store(store).failures
    (store / "tokenizer" / "vocab.txt").write_text("[PAD]\n")
    assert any(failure.startswith("tokenizer: files differ") for failure in inspect_store(store).failures)
    (store / "shard-00000.h5").unlink()
    assert "shard-00000.h5: shard is missing" in inspect_store(store).failures


def test_damaged_metadata_are_one_line(store: Path) -> None:
    file = store / "shard-00001.h5"
    content = file.read_bytes()
    for place in range(0, 12_000, 500):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        assert inspect_store(store).failures == ["shard-00001.h5: checksum differs from store.json's"]
    file.write_bytes(b"no HDF5" + content[7:])
    describe_anew(store)
    assert [line[:42] for line in inspect_store(store).failures] == ["shard-00001.h5: not readable as HDF5: rest"]
    file.write_bytes(content)
    with h5py.File(file, "r+") as shard:
        shard.move("samples/id_offsets", "samples/odd")
    describe_anew(store)
    assert inspect_store(store).failures == ["shard-00001.h5: samples/id_offsets: missing"]


def test_groups_across_splits_fail_unless_the_manifest_chose(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_synthetic_store(path, 10, samples_per_group=10, splits={"train": 0.5, "valid": 0.5})
    inspection = inspect_store(path)
    assert inspection.failures == []
    assert inspection.notes == ["1 groups have samples in several splits, as the manifest's splits require"]
    fields = json.loads((path / "store.json").read_text())
    description = StoreDescription.model_validate({**fields, "splits_source": "group hash"}).with_fingerprint()
    (path / "store.json").write_text(description.model_dump_json())
    assert inspect_store(path).failures == ["samples/split: 1 groups have samples in several splits"]


def test_verify_reads_everything_once_and_again_after_a_change(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = verify_module.file_sha256
    monkeypatch.setattr(verify_module, "file_sha256", lambda path: read.append(path.name) or real(path))
    verify_store(store)
    assert read == ["shard-00000.h5", "shard-00001.h5"]
    verify_store(store)
    assert len(read) == 2
    damage(store, "image/features", assign((3, 2), np.nan))
    with pytest.raises(UserError, match=r"shard-00001.h5: image/features: NaN or infinite, first in row 3"):
        verify_store(store)
    (store / VERIFIED_FILE).write_text("{broken")
    with pytest.raises(UserError, match="NaN"):
        verify_store(store)


def test_verify_sees_a_changed_file_of_the_same_size(store: Path) -> None:
    verify_store(store)
    damage(store, "image/pixels", assign((0, 0, 0, 0), 1), repair_checksums=False)
    with pytest.raises(UserError, match="checksum differs"):
        verify_store(store)
