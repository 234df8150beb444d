"""One command takes a folder of mixed files with faults to a valid store, killed or not, with any number of workers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opt_ds.ingest.report import REPORT_FILE
from opt_ds.store import FeatureStore, inspect_store
from tests.ingest.campaign import write_folder
from tests.ingest.test_pipeline import contents

ROOT = Path(__file__).parents[2]


def start(folder: Path, output: Path, workers: int, samples_per_shard: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "opt_ds", "prepare", "--manifest", str(folder), "--output", str(output), "--device", "cpu",
         "--workers", str(workers), "--samples-per-shard", str(samples_per_shard), "--vocab-size", "300"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def run(folder: Path, output: Path, workers: int, samples_per_shard: int) -> str:
    process = start(folder, output, workers, samples_per_shard)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def is_running(group: int) -> bool:
    """Whether a process of the group is alive (one that ended and was not yet waited for is not)."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def kill_alone(process: subprocess.Popen[str]) -> None:
    """Kill the main process only: its workers must notice and end by themselves."""
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    end = time.monotonic() + 120
    while is_running(process.pid):
        assert time.monotonic() < end, "a worker outlived its main process"
        time.sleep(0.05)


def check_reports(folder: Path, store: Path, good: set[str], expected: dict[str, str]) -> None:
    reports = [folder / "manifest.report.json", store / REPORT_FILE]
    entries = [entry for file in reports for entry in json.loads(file.read_text())["skipped_samples"]]
    reasons = {entry["id"]: entry["reason"] for entry in entries}
    assert len(entries) == len(reasons)
    assert sorted(reasons) == sorted(expected), "each fault is reported, and nothing else"
    assert {name: reason for name, reason in reasons.items() if expected[name] not in reason} == {}
    opened = FeatureStore(store)
    assert {opened.sample_id(index) for index in range(opened.num_samples)} == good
    assert inspect_store(store).failures == []


def same_bytes(one: Path, other: Path) -> None:
    ours, theirs = contents(one), contents(other)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_a_small_folder_killed_once(tmp_path: Path) -> None:
    """Run a small campaign: 90 files, 12 faults, killed when the first of several shards is complete."""
    good, expected = write_folder(tmp_path / "files", 90, 12)
    process = start(tmp_path / "files", tmp_path / "killed", 2, 12)
    while process.poll() is None and not (tmp_path / "killed" / "shard-00000.json").exists():
        time.sleep(0.01)
    kill_alone(process)
    assert not (tmp_path / "killed" / "store.json").exists()
    run(tmp_path / "files", tmp_path / "killed", 1, 12)
    check_reports(tmp_path / "files", tmp_path / "killed", good, expected)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_two_thousand_files_with_forty_faults(tmp_path: Path) -> None:
    """1, 2 and 4 workers, and a run killed ten times at random moments: the same bytes."""
    good, expected = write_folder(tmp_path / "files", 2000, 40)
    run(tmp_path / "files", tmp_path / "one", 1, 50)
    check_reports(tmp_path / "files", tmp_path / "one", good, expected)
    for workers in (2, 4):
        run(tmp_path / "files", tmp_path / str(workers), workers, 50)
        same_bytes(tmp_path / "one", tmp_path / str(workers))
    dice, killed = random.Random(3), tmp_path / "killed"
    for _ in range(10):
        process = start(tmp_path / "files", killed, 2, 50)
        before = len(list(killed.glob("shard-*.json"))) if killed.exists() else 0
        while process.poll() is None and len(list(killed.glob("shard-*.json"))) <= before:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 1.5))
        assert process.poll() is None, "it was done before it could be killed ten times"
        kill_alone(process)
    assert not (killed / "store.json").exists()
    run(tmp_path / "files", killed, 2, 50)
    same_bytes(tmp_path / "one", killed)
