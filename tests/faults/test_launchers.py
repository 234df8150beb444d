"""What a signal to each launcher's process does to a run: the table of docs/cluster.md, tried (srun's row in tests/slurm)."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from opt_ds.training import checkpoint
from tests.faults.ranks import PATIENCE_S, ROOT
from tests.training.runs import FITTED, free_port, rank_environment

pytestmark = pytest.mark.timeout(900)

BIN = Path(sys.executable).parent


def start(launcher: list[str], store: Path, output: Path) -> subprocess.Popen[str]:
    """Start two ranks of an endless run in a separate process group, and return once they have saved."""
    settings = (*FITTED, "train.max_steps=100000", "schedule.total_steps=100000", "checkpoint.every_steps=20")
    options = [part for setting in settings for part in ("--set", setting)]
    command = [*launcher, str(ROOT / "opt_ds" / "pretrain.py"), "--config", "opt-tiny", "--store", str(store)]
    environment = rank_environment(0, 1, 0) | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [*command, "--output", str(output), *options], env=environment, cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    began = time.monotonic()
    while not (output / "checkpoints" / "latest").is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < PATIENCE_S
        time.sleep(0.05)
    return process


TORCHRUN = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port"]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port"]


@pytest.mark.parametrize(
    ("launcher", "number", "to_group", "code"),
    [
        pytest.param(TORCHRUN, signal.SIGTERM, False, 1, id="torchrun-SIGTERM"),
        pytest.param(DEEPSPEED, signal.SIGINT, True, None, id="deepspeed-Ctrl-C", marks=pytest.mark.faults),
    ],
)
def test_the_ranks_save_and_leave(
    launcher: list[str], number: int, to_group: bool, code: int | None, store: Path, tmp_path: Path
) -> None:
    process = start([*launcher, str(free_port())], store, tmp_path / "run")
    try:
        (os.killpg if to_group else os.kill)(process.pid, number)
        said = process.communicate(timeout=PATIENCE_S)[0]
        saved = checkpoint.find_resumable(tmp_path / "run")
        assert saved is not None
        assert f"saved after step {int(saved.name[5:])}" in said, said
        assert code is None or process.returncode == code, said
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.faults
@pytest.mark.parametrize("launcher", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_ranks_save_and_end_when_the_launcher_alone_ends(
    launcher: list[str], number: int, store: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = start([*launcher, str(free_port())], store, output)
    try:
        process.send_signal(number)
        said = process.communicate(timeout=PATIENCE_S)[0]  # to the end of the output: every process that writes has ended
        saved = checkpoint.find_resumable(output)
        assert saved is not None
        assert f"saved after step {int(saved.name[5:])}" in said, said
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

