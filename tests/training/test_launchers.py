"""A rank notices that its launcher was killed, and outlives a parent that is none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import sys, time
from opt_ds.training.signals import StopRequest
stop = StopRequest()
open(sys.argv[1], "w").write("started")
for _ in range(20):
    if stop.reason():
        break
    time.sleep(0.1)
open(sys.argv[2], "w").write(stop.reason() or "went on")
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.mark.parametrize(("name", "told"), [("deepspeed", "the launcher has ended"), ("shell", "went on")])
def test_a_rank_stops_with_its_launcher_only(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(PARENT)
    (tmp_path / "rank.py").write_text(RANK)
    started, ended = tmp_path / "started", tmp_path / "ended"
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / name), str(tmp_path / "rank.py"), str(started), str(ended)], env=os.environ
    )
    wait_for(started)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(ended)
    assert ended.read_text() == told


def wait_for(file: Path) -> None:
    end = time.monotonic() + 20
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end, f"{file.name} did not appear"
        time.sleep(0.05)
