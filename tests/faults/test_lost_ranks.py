"""A rank that hangs, or calls another collective than the others: all end in bounded time with a message.

A killed rank is in test_kills.py.
"""

import signal
import time
from pathlib import Path

import pytest

from opt_ds.training import checkpoint
from tests.faults.ranks import ranks

pytestmark = pytest.mark.timeout(900)

SETTINGS = ("train.max_steps=100000", "schedule.total_steps=100000", "checkpoint.every_steps=2", "guard.rank_timeout_s=10")


def test_a_hung_rank_does_not_hang_the_others(store: Path, tmp_path: Path) -> None:
    with ranks(store, tmp_path / "run", SETTINGS) as run:
        assert run.until(lambda: (tmp_path / "run" / "checkpoints" / "latest").is_file()), run.said(0)
        run.processes[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert run.processes[0].wait(timeout=120) == 1, run.said(0)
        assert time.monotonic() - began < 60
        assert "error: rank 0 lost contact with another rank" in run.said(0)
    assert checkpoint.find_resumable(tmp_path / "run") is not None


def test_a_rank_that_nobody_joins_says_so(store: Path, tmp_path: Path) -> None:
    with ranks(store, tmp_path / "run", (*SETTINGS, "guard.rank_timeout_s=5")) as run:
        run.processes[0].kill()
        assert run.processes[1].wait(timeout=240) == 1, run.said(1)
        assert "error: rank 1: rank 1 could not join the other ranks at 127.0.0.1:" in run.said(1)


def test_ranks_whose_collectives_do_not_match_end_with_a_message(store: Path, tmp_path: Path) -> None:
    settings = ("train.max_steps=100000", "schedule.total_steps=100000", "zero.stage=3", "guard.compare_calls_s=6")
    with ranks(store, tmp_path / "run", settings, "skipped gather") as run:
        assert run.until(lambda: "skipping a gather" in run.said(1)), run.said(1)
        began = time.monotonic()
        assert all(process.wait(timeout=120) for process in run.processes)
        assert time.monotonic() - began < 60
        said = run.said(0) + run.said(1)
        # gloo itself ends a process that receives more than it expects; the other loses contact. See test_collectives.py.
        assert "error: rank" in said and ("collective calls do not match: in call" in said or "collective mismatch" in said), said
