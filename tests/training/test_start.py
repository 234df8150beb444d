"""What a start reads of the store and the checkpoint: once per run, by one rank, and again only what has changed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_ds.config import Config
from opt_ds.errors import UserError
from opt_ds.store import verify as verify_module
from opt_ds.store.records import run_records
from opt_ds.store.verify import VERIFIED_FILE, verify_store
from opt_ds.training import checkpoint_files
from tests.training.runs import free_port, make_store, rank_environment, tiny_config, train

pytestmark = pytest.mark.timeout(300)


def launch(config: Config, output: Path) -> list[list[str]]:
    """Train on two ranks. Return the names of the files that each rank hashed."""
    return start({"config": config.model_dump(mode="json"), "store": config.data.stores[0], "output": str(output)}, output)


def start(description: dict[str, Any], output: Path) -> list[list[str]]:
    """Run job_start.py on two ranks. Return the names of the files that each rank hashed."""
    job = output.with_name("job.json")
    job.write_text(json.dumps(description))
    port, command = free_port(), [sys.executable, "-m", "tests.training.job_start", str(job)]
    ranks = [subprocess.Popen(command, env=rank_environment(rank, 2, port)) for rank in range(2)]
    assert [rank.wait(timeout=140) for rank in ranks] == [0, 0]
    return [json.loads(Path(f"{job}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.faults  # two launches of two ranks: a minute
def test_one_rank_hashes_a_read_only_store_once_and_a_checkpoint_once_per_launch(tmp_path: Path) -> None:
    store, output = make_store(tmp_path / "store"), tmp_path / "run"
    before = sorted(path.name for path in store.iterdir())
    main, other = launch(tiny_config(store, "train.max_steps=1"), output)
    assert "shard-00000.h5" in main and not [name for name in other if name.startswith(("shard", "tokenizer", "vocab"))]
    main, other = launch(tiny_config(store, "train.max_steps=2"), output)
    assert "shard-00000.h5" not in main
    read = [name for name in main if name.endswith(".safetensors")]
    assert {"model.safetensors", "moments.safetensors"} <= set(read)
    assert not [name for name in other if name.endswith(".safetensors") or name == "state.json" or name.startswith("shard")]
    assert sorted(path.name for path in store.iterdir()) == before


@pytest.mark.faults  # two ranks
def test_fine_tuning_has_one_rank_read_what_is_read_once(learnable: Path, tmp_path: Path, group: Any) -> None:
    train(tiny_config(learnable, "train.max_steps=1"), tmp_path / "run", group)
    store, output = tmp_path / "read-only", tmp_path / "tuned"
    shutil.copytree(learnable, store)
    given = ["captioning", "--checkpoint", str(tmp_path / "run"), "--store", str(store), "--output", str(output)]
    main, other = start({"finetune": [*given, "--set", "train.max_steps=1"], "store": str(store), "output": str(output)}, output)
    assert main.count("shard-00000.h5") == 1
    assert not [name for name in other if name.startswith(("shard", "tokenizer", "vocab"))]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Record the shards that this process hashes from now on. No store can be written."""
    read: list[str] = []
    real = verify_module.file_sha256
    monkeypatch.setattr(verify_module, "file_sha256", lambda path: read.append(path.name) or real(path))
    monkeypatch.setattr("opt_ds.store.records.os.access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return read


def test_a_changed_byte_of_a_read_only_store_is_found_again(tmp_path: Path, hashed: list[str]) -> None:
    store, run = make_store(tmp_path / "store"), tmp_path / "run"
    verify_store(store, run=run)
    verify_store(store, run=run)
    assert hashed == ["shard-00000.h5"]
    assert (run_records(store, run) / VERIFIED_FILE).is_file() and not (store / VERIFIED_FILE).exists()
    shard = store / "shard-00000.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000\.h5: checksum differs"):
        verify_store(store, run=run)
    with pytest.raises(UserError, match="checksum differs"):
        verify_store(store, run=run)


def test_outside_a_run_the_users_cache_remembers_a_read_only_store(tmp_path: Path, hashed: list[str]) -> None:
    store = make_store(tmp_path / "store")
    verify_store(store)
    verify_store(store)
    verify_store(store, run=tmp_path / "run")
    assert len(hashed) == 1 and not (store / VERIFIED_FILE).exists()
    shard = store / "shard-00000.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="checksum differs"):
        verify_store(store)


def test_without_a_place_for_records_a_read_only_store_is_read_each_time(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store")
    (tmp_path / "no-folder").write_text("")
    for cache in (str(tmp_path / "no-folder"), "/proc"):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        verify_store(store)
        verify_store(store)
    assert len(hashed) == 4


def test_the_index_that_a_read_only_store_lacks_is_made_once_for_the_run(tmp_path: Path, hashed: list[str]) -> None:
    from opt_ds.store import FeatureStore
    from opt_ds.store.index import INDEX_FILE

    store, run = make_store(tmp_path / "store"), tmp_path / "run"
    expected = FeatureStore(store).rows.copy()
    (store / INDEX_FILE).unlink()
    verify_store(store, run=run)
    found = FeatureStore(store, run).rows
    assert np.array_equal(found, expected) and not found.flags.owndata
    assert (run_records(store, run) / INDEX_FILE).is_file() and not (store / INDEX_FILE).exists()


def test_a_rank_trusts_another_ranks_hash_of_an_unchanged_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    known = {key: value for key, value in _hashes_of_main(file).items() if key[0] == str(file)}
    monkeypatch.setattr(checkpoint_files, "_hashes", {})  # as in another process
    checkpoint_files.take_hashes(known)
    read: list[Path] = []
    real = checkpoint_files.file_sha256
    monkeypatch.setattr(checkpoint_files, "file_sha256", lambda path: read.append(path) or real(path))
    assert checkpoint_files.sha256_once(file) == known.popitem()[1] and not read
    file.write_bytes(b"Weights")
    assert checkpoint_files.sha256_once(file) == real(file) and read == [file]


def _hashes_of_main(file: Path) -> dict[Any, str]:
    checkpoint_files.sha256_once(file)
    return checkpoint_files.known_hashes()
