"""Test Ctrl-C, SIGTERM and a closed terminal: one line, no traceback of any process, no partial file, no process left.

Exit code: 128 plus the signal's number, 75 where training saved. A terminal sends its signals to all processes of a command.
"""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import opt_ds
from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.training import checkpoint

RESUMES = "stopped: run the same command again to resume"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupts") / "store"
    write_synthetic_store(path, 40, vocab_size=40, regions=(1, 4), frames=(2, 8), image_feature_dim=8, audio_feature_dim=6)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(200):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    lines = [{"id": str(number), "image": f"{number}.png", "text": f"image {number}"} for number in range(200)]
    (folder / "manifest.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def interrupt(
    command: list[str],
    when: str,
    *,
    group: bool,
    folder: Path,
    number: int = signal.SIGINT,
    imports: bool = False,
    nohup: bool = False,
) -> tuple[int, list[str]]:
    """Run `opt-ds`, send a signal when its output has the text, and return its code and the lines about the stop.

    `imports`: the output also names each module as it is loaded. `nohup`: it is started with SIGHUP ignored.
    """
    log = folder.with_name(f"{folder.name}.log")
    python = [sys.executable, *(["-X", "importtime"] if imports else []), "-m", "opt_ds"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*(["nohup"] if nohup else []), *python, *command], stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 90 and when not in log.read_text(errors="replace"):
        time.sleep(0.05)
    (os.killpg if group else os.kill)(process.pid, number)
    if nohup:
        time.sleep(1)
        assert process.poll() is None, "it outlives its terminal"
        os.kill(process.pid, signal.SIGTERM)
    code = process.wait(60)
    text = log.read_text(errors="replace").replace("\r", "\n")
    assert "Traceback" not in text and "KeyboardInterrupt" not in text, text[-3000:]
    assert not left_over(process.pid), "no process is left"
    return code, [line for line in text.splitlines() if line.startswith(("stopped", "SIG"))]


def left_over(session: int, patience_s: float = 5.0) -> list[str]:
    """The command lines of the processes of this session that are still there after a while."""
    began = time.monotonic()
    while True:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] not in "ZX":
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:  # it has ended
                continue
        if not found or time.monotonic() - began > patience_s:
            return found
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "when", "group"),
    [
        (signal.SIGINT, "features:", True),
        pytest.param(signal.SIGINT, "file/s", False, marks=pytest.mark.faults),
        pytest.param(signal.SIGTERM, "features:", True, marks=pytest.mark.faults),
        (signal.SIGTERM, "file/s", False),
        (signal.SIGHUP, "file/s", True),
        pytest.param(signal.SIGHUP, "features:", False, marks=pytest.mark.faults),
    ],
)
def test_preparation_with_workers(number: int, when: str, group: bool, images: Path, tmp_path: Path) -> None:
    command = [
        "prepare",
        "--manifest",
        str(images / "manifest.jsonl"),
        "--output",
        str(tmp_path / "store"),
        "--workers",
        "2",
    ]
    assert interrupt(command, when, group=group, folder=tmp_path, number=number) == (128 + number, [RESUMES])
    assert not (tmp_path / "store" / "store.json").exists()


def test_training_of_the_dvae(store: Path, tmp_path: Path) -> None:
    command = ["train-dvae", "--store", str(store), "--output", str(tmp_path), "--preset", "dvae-tiny", "--steps", "99999"]
    assert interrupt(command, "step/s", group=True, folder=tmp_path) == (130, [RESUMES])
    assert checkpoint.find_resumable(tmp_path) is not None, "a Ctrl-C saves too"


@pytest.mark.parametrize(
    ("number", "nohup"),
    [(signal.SIGHUP, False), (signal.SIGTERM, False), (signal.SIGHUP, True)],
)
@pytest.mark.faults  # the next test has a terminal's SIGHUP
def test_training_of_the_dvae_saves_and_asks_to_be_requeued(number: int, nohup: bool, store: Path, tmp_path: Path) -> None:
    command = ["train-dvae", "--store", str(store), "--output", str(tmp_path), "--preset", "dvae-tiny", "--steps", "99999"]
    code, lines = interrupt(command, "step/s", group=True, folder=tmp_path, number=number, nohup=nohup)
    name = "SIGTERM" if nohup else signal.Signals(number).name
    assert code == 75 and len(lines) == 1, lines
    match = re.fullmatch(rf"{name}: saved after step (\d+); run the same command again to resume", lines[0])
    found = checkpoint.find_resumable(tmp_path)
    assert match and found is not None and checkpoint.read_record(found)[0] == int(match[1])


def test_a_terminal_that_is_lost_costs_nothing(store: Path, tmp_path: Path) -> None:
    command = ["train-dvae", "--store", str(store), "--output", str(tmp_path / "run"), "--preset", "dvae-tiny"]
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "opt_ds", *command, "--steps", "99999"])
    termios.tcsetwinsize(terminal, (24, 100))  # otherwise there is no space for a progress bar
    shown = b""
    while b"step/s" not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 75, shown.decode()
    assert checkpoint.find_resumable(tmp_path / "run") is not None


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("group", [True, False])
def test_an_update_leaves_the_store_as_it_was(number: int, group: bool, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    prepare(images / "manifest.jsonl", path, PrepareSettings(vocab_size=60), workers=1, device="cpu")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    command = [
        "update",
        str(path),
        "--modality",
        "image",
        "--manifest",
        str(images / "manifest.jsonl"),
        "--workers",
        "2",
    ]
    assert interrupt(command, "file/s", group=group, folder=tmp_path, number=number) == (128 + number, ["stopped"])
    after = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert {file: content for file, content in after.items() if file.name != "verified.json"} == before


@pytest.mark.parametrize("module", ["| typer", "| numpy"])
def test_while_libraries_load(module: str, tmp_path: Path) -> None:
    code, lines = interrupt(["plan"], module, group=True, folder=tmp_path, imports=True)
    assert (code, lines) == (130, ["stopped"])


@pytest.mark.parametrize("place", ["in the command", "while libraries load"])
def test_within_the_definition_of_a_namedtuple(place: str, tmp_path: Path) -> None:
    """namedtuple runs text by `exec`. Interrupted there, `python -m` would end by the signal, not with the exit code."""
    if place == "in the command":
        (tmp_path / "program.py").write_text(
            "import sys\nfrom opt_ds.cli.program import run_program\n"
            "def command() -> None: exec('raise KeyboardInterrupt')\n"
            "sys.exit(run_program(command, [], 'program'))\n"
        )
        arguments = ["program"]
    else:
        (tmp_path / "typer.py").write_text("exec('raise KeyboardInterrupt')\n")
        arguments = ["opt_ds", "--help"]
    path = os.pathsep.join([str(tmp_path), str(Path(opt_ds.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", *arguments], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_while_waiting_for_a_lock(store: Path, tmp_path: Path) -> None:
    with open(store.with_name(f".{store.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["split", str(store), "--ratio", "train=1"]
        assert interrupt(command, "waiting", group=False, folder=tmp_path) == (130, ["stopped"])
