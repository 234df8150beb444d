"""Ctrl-C: one line, exit code 130, no traceback of any process, whether a terminal sends it to all or one process gets it."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opt_ds.store.synthetic import write_synthetic_store

RESUMES = "stopped: the same command goes on where it was"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupts") / "store"
    write_synthetic_store(path, 40, vocab_size=40, regions=(1, 4), frames=(2, 8), image_feature_dim=8, audio_feature_dim=6)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(200):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}")
    return folder


def interrupt(command: list[str], when: str, *, group: bool, folder: Path, imports: bool = False) -> tuple[int, list[str]]:
    """Run `opt-ds`, send SIGINT when its output has the text; give its code and the lines that say that it stopped.

    `imports`: the output also names each module as it is loaded.
    """
    log = folder.with_name(f"{folder.name}.log")
    python = [sys.executable, *(["-X", "importtime"] if imports else []), "-m", "opt_ds"]
    with open(log, "wb") as output:
        process = subprocess.Popen([*python, *command], stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 90 and when not in log.read_text(errors="replace"):
        time.sleep(0.05)
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    code = process.wait(60)
    text = log.read_text(errors="replace").replace("\r", "\n")
    assert "Traceback" not in text and "KeyboardInterrupt" not in text, text[-3000:]
    return code, [line for line in text.splitlines() if line.startswith("stopped")]


@pytest.mark.parametrize(("when", "group"), [("features:", True), ("file/s", False)])
def test_preparation_with_workers(when: str, group: bool, pictures: Path, tmp_path: Path) -> None:
    command = ["prepare", "--manifest", str(pictures), "--output", str(tmp_path / "store"), "--workers", "2"]
    assert interrupt(command, when, group=group, folder=tmp_path) == (130, [RESUMES])


def test_training_of_the_dvae(store: Path, tmp_path: Path) -> None:
    command = ["train-dvae", "--store", str(store), "--output", str(tmp_path), "--preset", "dvae-tiny", "--steps", "99999"]
    assert interrupt(command, "step/s", group=True, folder=tmp_path) == (130, [RESUMES])


@pytest.mark.parametrize("module", ["| typer", "| numpy"])
def test_while_libraries_load(module: str, tmp_path: Path) -> None:
    code, lines = interrupt(["plan"], module, group=True, folder=tmp_path, imports=True)
    assert (code, lines) == (130, ["stopped"])


def test_while_waiting_for_a_lock(store: Path, tmp_path: Path) -> None:
    with open(store.with_name(f".{store.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["split", str(store), "--ratio", "train=1"]
        assert interrupt(command, "waiting", group=False, folder=tmp_path) == (130, ["stopped"])
