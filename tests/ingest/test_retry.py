"""What is no fault of a file stops the run; what was skipped is tried again; the store is then the one of good files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from opt_ds.decoding.decoder import EnvironmentFaultError
from opt_ds.errors import UserError
from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.ingest.report import REPORT_FILE
from opt_ds.store import FeatureStore
from opt_ds.store.split import split_by_ratio
from tests.ingest.test_pipeline import contents
from tests.logs import logged_lines

SETTINGS = PrepareSettings(images="npz", samples_per_shard=2, vocab_size=40)
NAMES = ("a", "bad", "c", "gone", "fault", "f")


def run(folder: Path, output: Path, **options: object) -> list[str]:
    with logged_lines() as logged:
        prepare(folder / "manifest.jsonl", output, SETTINGS, workers=1, device="cpu", **options)  # type: ignore[arg-type]
    return logged


def write_good(path: Path, seed: int) -> None:
    path.unlink(missing_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(seed).standard_normal(4000), 16000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six samples in three shards: one is broken, one missing, one on a disk with I/O errors."""
    folder = tmp_path / "files"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        write_good(folder / f"{name}.wav", seed)
    (folder / "bad.wav").write_text("not an audio file")
    (folder / "gone.wav").unlink()
    (folder / "fault.wav").unlink()
    (folder / "fault.wav").symlink_to("/proc/self/mem")
    lines = [{"id": name, "audio": f"{name}.wav", "text": f"some words {name}", "split": "train"} for name in NAMES]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def as_of_an_older_version(store: Path) -> None:
    """Give the report and the journals of unfinished shards the keys that an older version wrote."""
    for file in store.glob("*.json"):
        file.write_text(file.read_text(encoding="utf-8").replace('"truncated":', '"cut":'), encoding="utf-8")


@pytest.mark.parametrize("older", [False, True])
def test_a_store_is_completed_as_if_its_files_had_been_good_at_once(folder: Path, tmp_path: Path, older: bool) -> None:
    output = tmp_path / "store"
    with pytest.raises(EnvironmentFaultError, match=r"fault.wav: cannot be read \(Input/output error\)"):
        run(folder, output)
    if older:
        as_of_an_older_version(output)
    assert (output / "shard-00001.h5").exists() and not (output / "store.json").exists(), "what is done is kept"

    write_good(folder / "fault.wav", 4)
    run(folder, output)
    report = json.loads((output / REPORT_FILE).read_text())
    assert [entry["id"] for entry in report["skipped_samples"]] == ["bad", "gone"]
    assert report["skipped_files"]["gone.wav"] is None and report["skipped_files"]["bad.wav"][0] == len("not an audio file")
    assert not any("skipped file" in line for line in run(folder, output)), "nothing has changed"

    if older:
        as_of_an_older_version(output)
    for seed, name in ((1, "bad"), (3, "gone")):
        write_good(folder / f"{name}.wav", seed)
    before = (output / "shard-00002.h5").stat().st_mtime_ns
    assert any("2 skipped files have changed since" in line and "--retry-skipped" in line for line in run(folder, output))
    changed = Path(shutil.copytree(output, tmp_path / "changed"))
    run(folder, output, retry_skipped=True)
    assert FeatureStore(output).num_samples == 6
    assert (output / "shard-00002.h5").stat().st_mtime_ns == before, "whole shards are kept"
    assert "already prepared" in run(folder, output, retry_skipped=True)[-1], "nothing is left to retry"

    run(folder, tmp_path / "at-once")
    ours, theirs = contents(output), contents(tmp_path / "at-once")
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []

    split_by_ratio(changed, {"train": 0.5, "valid": 0.5}, 0)
    with pytest.raises(UserError, match=r"another finished|changed after its preparation"):
        run(folder, changed, retry_skipped=True)


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_skipped(tmp_path: Path) -> None:
    output = tmp_path / "store"
    for seed, name in enumerate("ab"):
        write_good(tmp_path / f"{name}.wav", seed)
    lines = [{"id": name, "audio": f"{name}.wav", "text": "some words", "split": "train"} for name in "ab"]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    process = subprocess.Popen(
        [sys.executable, "-m", "opt_ds", "prepare", "--manifest", str(tmp_path / "manifest.jsonl"), "--output", str(output),
         "--images", "npz", "--samples-per-shard", "2", "--vocab-size", "40", "--workers", "1", "--device", "cpu"],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while process.poll() is None and not (workers := [pid for pid in _children(process.pid) if _children(pid)]):
        time.sleep(0.02)  # until a worker has a decoder
    assert process.poll() is None, process.communicate()[0]
    os.kill(workers[0], signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert FeatureStore(output).num_samples == 2


def _children(of: int) -> list[int]:
    try:
        return [int(pid) for task in Path(f"/proc/{of}/task").iterdir() for pid in (task / "children").read_text().split()]
    except OSError:  # it ended meanwhile
        return []
