"""A checkpoint that cannot be written is one line on every rank, whatever went wrong."""

import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ds.training import checkpoint, checkpoint_writer
from opt_ds.training.checkpoint_writer import CheckpointError, CheckpointWriter, Contents
from opt_ds.training.distributed import Ranks, SingleProcess


class ThreadRank:
    """One of two ranks that are threads of this process, with the collective calls of a writer."""

    def __init__(self, rank: int, shared: dict[str, Any], barrier: threading.Barrier) -> None:
        self.ranks, self._shared, self._barrier = Ranks(rank, 2), shared, barrier

    def from_main(self, value: Any) -> Any:
        if self.ranks.is_main:
            self._shared["value"] = value
        self.wait()
        found = self._shared["value"]
        self.wait()
        return found

    def wait(self) -> None:
        self._barrier.wait(20)


def parameters(model: torch.nn.Module, group: Any) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for name, parameter in model.named_parameters():
        if isinstance(group, ThreadRank):
            group.wait()  # as a gather does
        yield name, {"weight": parameter.detach(), "exp_avg": torch.zeros_like(parameter)}


def save_and_wait(output: Path, group: Any, step: int) -> str:
    """Save on one rank. Return the error."""
    model = torch.nn.Linear(2, 3)
    writer = CheckpointWriter(output, group, 2, {})
    try:
        writer.save(Contents({"step": step}, model, parameters(model, group)))
        writer.wait()
        return ""
    except CheckpointError as error:
        return str(error)
    finally:
        writer.close()


def on_two_ranks(output: Path, step: int) -> list[str]:
    """Save on both ranks. Return their errors."""
    shared: dict[str, Any] = {}
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as ranks:
        running = [ranks.submit(save_and_wait, output, ThreadRank(rank, shared, barrier), step) for rank in range(2)]
        return [rank.result(60) for rank in running]


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


FAILURES: dict[str, tuple[Any, str, Exception, str]] = {
    "a full disk": (
        checkpoint_writer, "save_file", RuntimeError("I/O error: No space left on device (os error 28)"),
        "(model.safetensors: I/O error: No space left on device (os error 28)): free space, then start again",
    ),
    "a folder without permission": (
        checkpoint_writer, "sync_folder", PermissionError(errno.EACCES, "Permission denied"),
        "(Permission denied): make sure that the folder can be written to, then start again",
    ),
    "a fault of the program": (
        checkpoint_writer, "point_to", TypeError("first line\n  second line"),
        "(TypeError: first line second line): start again with the same --output to resume, and report this line",
    ),
    "a fault without text": (checkpoint_writer, "_prune", AssertionError(), "(AssertionError): start again with"),
    "no memory in the thread": (checkpoint_writer, "file_sha256", MemoryError(), "(out of host memory): use fewer"),
    "no memory for the copy": (
        checkpoint_writer, "_copy", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        "(out of host memory): use fewer",
    ),
    "a folder that is gone": (shutil, "disk_usage", FileNotFoundError(errno.ENOENT, "No such file"), "(No such file): make sure"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILURES)
def test_any_failure_reaches_every_rank_as_one_line(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_two_ranks(tmp_path, 1) == ["", ""]
    owner, name, error, expected = FAILURES[what]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(error))
        main, other = on_two_ranks(tmp_path, 2)
    assert main == other and "\n" not in main
    assert main.startswith(f"checkpoint {tmp_path}/checkpoints/step-00000002 could not be written ") and expected in main
    if what not in ("a folder without permission", "a fault of the program", "a fault without text"):
        found = checkpoint.find_resumable(tmp_path)
        assert found is not None and found.name == "step-00000001"
    assert on_two_ranks(tmp_path, 3) == ["", ""]


def test_a_failure_that_nobody_waited_for_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setattr(checkpoint_writer, "sync_folder", failing(OSError(errno.EIO, "Input/output error")))
    model, group = torch.nn.Linear(2, 3), SingleProcess()
    writer = CheckpointWriter(tmp_path, group, 2, {})
    writer.save(Contents({"step": 1}, model, parameters(model, group)))
    writer.close()  # as after another error of the run
    assert len(logged) == 1 and "step-00000001 could not be written (Input/output error)" in logged[0]
