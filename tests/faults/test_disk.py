"""Test full disks and files damaged during a run: one line reports it, and at most the last checkpoint is unusable."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from opt_ds.training import checkpoint
from tests.faults.ranks import ranks
from tests.logs import logged_lines
from tests.small_disk import SmallDisk
from tests.training.runs import hashes
from tests.training.test_checkpoint import flip_byte

pytestmark = pytest.mark.timeout(900)

SETTINGS = ("schedule.total_steps=100", "checkpoint.every_steps=2", "checkpoint.keep=20", "train.max_steps=12")


@pytest.fixture(scope="module")
def straight(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run never disturbed."""
    output = tmp_path_factory.mktemp("straight") / "run"
    with ranks(store, output, SETTINGS, num=1) as run:
        assert run.wait() == [0], run.said(0)
    return output


def test_a_disk_that_fills_up_ends_the_run_with_a_line_and_the_last_checkpoint_serves(
    store: Path, straight: Path, small_disk: SmallDisk
) -> None:
    one = sum(file.stat().st_size for file in checkpoint.all_checkpoints(straight)[0].iterdir())
    output = small_disk.folder / "run"
    with ranks(store, output, (*SETTINGS, "train.max_steps=6"), num=1) as run:
        assert run.wait() == [0], run.said(0)
    used = shutil.disk_usage(small_disk.folder).used
    small_disk.resize((used + int(0.6 * one)) // 1024)
    with ranks(store, output, SETTINGS, num=1) as run:  # refused at the start: not even one more fits
        assert run.wait() == [2], run.said(0)
        assert "GiB free, one checkpoint takes" in run.said(0) and "Traceback" not in run.said(0)
    small_disk.resize((used + int(2.2 * one)) // 1024)
    with ranks(store, output, SETTINGS, num=1) as run:  # two more fit
        assert run.wait() == [2], run.said(0)
        assert "error: checkpoint" in run.said(0) or "GiB free" in run.said(0), run.said(0)
        assert "Traceback" not in run.said(0), run.said(0)
    newest = checkpoint.find_resumable(output)
    assert newest is not None and newest.name in ("step-00000008", "step-00000010")
    small_disk.resize(65536)
    with ranks(store, output, SETTINGS, num=1) as run:
        assert run.wait() == [0], run.said(0)
        assert f"resuming from {newest}" in run.said(0)
    assert hashes(output, 12) == hashes(straight, 12)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda newest: os.truncate(newest / "model.safetensors", 100),
    "damaged": lambda newest: flip_byte(newest / "moments.safetensors"),
    "missing": lambda newest: (newest / "state.json").unlink(),
    'no pointer "latest"': lambda newest: (newest.parent / "latest").unlink(),
}


def test_damaged_files_are_named_and_the_one_before_is_taken(store: Path, straight: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(straight, tmp_path / "run"))
    newest, *_ = checkpoint.all_checkpoints(output)
    for word, damage in DAMAGES.items():
        shutil.rmtree(output)
        shutil.copytree(straight, output)
        damage(newest)
        with logged_lines() as logged:
            found = checkpoint.find_resumable(output)
        expected = "step-00000012" if "pointer" in word else "step-00000010"
        assert found is not None and found.name == expected and word in logged[0], (word, logged)
    shutil.rmtree(output)
    shutil.copytree(straight, output)
    DAMAGES["damaged"](newest)
    with ranks(store, output, SETTINGS, num=1) as run:
        assert run.wait() == [0], run.said(0)
        assert "step-00000012 is not usable: moments.safetensors is damaged" in run.said(0)
    assert hashes(output, 12) == hashes(straight, 12)
