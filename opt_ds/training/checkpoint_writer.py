"""Asynchronous checkpoint writer.

Training waits only for the copy to host memory; a thread of rank 0 writes it to disk.

A checkpoint is written to a temporary folder, flushed to disk and renamed. Then the pointers are replaced and old
checkpoints are removed. At most one checkpoint is being written: the next `save` and the end of the run wait for it.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from opt_ds.errors import UserError
from opt_ds.store.files import atomic_file, file_sha256, follow_umask, is_disk_full, sync_folder, write_json
from opt_ds.training import checkpoint
from opt_ds.training.checkpoint import COMPLETE, FOLDER, MODEL_FILE, MOMENTS_FILE, STATE_FILE
from opt_ds.training.checkpoint_files import pointer_fields, pointer_text
from opt_ds.training.distributed import ProcessGroup, SingleProcess

_LOG = logging.getLogger(__name__)
_BYTES_PER_PARAMETER = 12  # fp32 weight and two moments
_SPACE_MARGIN = 1.05


class CheckpointError(UserError):
    """A checkpoint could not be written. Earlier checkpoints are unchanged."""


class Contents(NamedTuple):
    """What a checkpoint holds."""

    state: dict[str, Any]  # progress of the run, with its "step", for state.json
    model: nn.Module  # whose persistent buffers are stored
    #: Every parameter's name, and its full "weight" and optimizer state by key. Iterating may be a collective call.
    parameters: Iterator[tuple[str, dict[str, torch.Tensor]]]


class CheckpointWriter:
    """Writer of a run's checkpoints. `save` and `wait` are collective calls; rank 0 writes.

    `about` (config, plan version, stores, versions) is stored in every state.json. The last `keep` checkpoints and the
    best one are kept.
    """

    def __init__(self, output: Path, group: ProcessGroup | SingleProcess, keep: int, about: dict[str, Any]) -> None:
        self._output, self._group, self._keep, self._about = output, group, keep, about
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.stall_s = 0.0  # time for which the last checkpoint blocked training
        self.write_s = 0.0  # time spent writing the last checkpoint
        if group.ranks.is_main:
            for leftover in (output / FOLDER).glob(".step-*.tmp"):  # left by a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)

    @property
    def has_failed(self) -> bool:
        """Whether the last checkpoint could not be written, known on rank 0 only. `wait` then raises on every rank."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def save(self, contents: Contents, best: bool = False) -> None:
        """Copy weights and optimizer state to host memory and start writing the checkpoint.

        Raise CheckpointError on every rank if the previous checkpoint could not be written, or if this one fits neither
        into memory nor onto the disk.
        """
        began = time.perf_counter()
        self.wait()
        weights: dict[str, torch.Tensor] = {}
        moments: dict[str, torch.Tensor] = {}

        def take(name: str, tensors: dict[str, torch.Tensor]) -> None:
            weights[name] = _copy(tensors["weight"]).float()
            moments.update({f"{name}.{key}": _copy(tensor) for key, tensor in tensors.items() if key != "weight"})

        def start() -> None:
            weights.update({name: _copy(buffer) for name, buffer in checkpoint.buffers_of(contents.model).items()})
            needed = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values())) * _SPACE_MARGIN
            check_free(self._output, needed)
            pointers = ("latest", "best") if best else ("latest",)
            state = {**contents.state, **self._about}
            self._writing = self._thread.submit(self._write, target, weights, moments, state, pointers)

        target = self._output / FOLDER / checkpoint.folder_name(contents.state["step"])
        problem = None
        for name, tensors in contents.parameters:  # to its end on every rank, because the others wait in its calls
            problem = problem or self._problem_of_main(target, partial(take, name, tensors))
        self._raise_everywhere(problem or self._problem_of_main(target, start))
        self.stall_s = time.perf_counter() - began

    def wait(self) -> None:
        """Wait until no checkpoint is being written. Raise CheckpointError on every rank if writing failed."""
        writing, self._writing = self._writing, None
        self._raise_everywhere(str(writing.exception() or "") if writing is not None else None)

    def close(self) -> None:
        """Wait for the writer thread to end. Log a warning if its last checkpoint failed and `wait` did not report it."""
        self._thread.shutdown(wait=True)
        if self.has_failed:
            assert self._writing is not None
            _LOG.warning(f"{self._writing.exception()}")

    def _problem_of_main(self, target: Path, work: Callable[[], None]) -> str | None:
        """Do `work` on rank 0. Return a description of its failure, or None."""
        if self._group.ranks.is_main:
            try:
                work()
            except Exception as error:  # of any kind: the other ranks wait for the result
                return str(_described(target, error))
        return None

    def _raise_everywhere(self, problem: str | None) -> None:
        problem = self._group.from_main(problem)
        if problem:
            raise CheckpointError(problem)

    def _write(
        self,
        target: Path,
        weights: dict[str, torch.Tensor],
        moments: dict[str, torch.Tensor],
        state: dict[str, Any],
        pointers: tuple[str, ...],
    ) -> None:
        began = time.perf_counter()
        try:
            _write_folder(target, weights, moments, state)
            # A rewrite of the best checkpoint: its pointer holds the hash of the former one.
            if _best(self._output) == target:
                pointers = (*pointers, "best")
            for pointer in pointers:
                point_to(self._output, pointer, target)
            _prune(self._output, self._keep, target, state.get("best_step"))
        except Exception as error:
            raise _described(target, error) from error
        self.write_s = time.perf_counter() - began


def _described(target: Path, error: Exception) -> "CheckpointError":
    """Return the error that reports, in one line, why a checkpoint could not be written."""
    if isinstance(error, UserError):
        return CheckpointError(str(error))
    reason, remedy = " ".join(str(error).split())[:300], "start again with the same --output to resume, and report this line"
    if isinstance(error, MemoryError) or "can't allocate memory" in reason:
        reason, remedy = "out of host memory", "use fewer processes or a machine with more memory, then start again"
    elif isinstance(error, OSError):
        reason = error.strerror or reason
        remedy = "free space" if is_disk_full(error) else "make sure that the folder can be written to"
        remedy += ", then start again"
    else:
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return CheckpointError(f"checkpoint {target} could not be written ({reason}): {remedy}")


def point_to(output: Path, pointer: str, target: Path) -> None:
    """Make `checkpoints/<pointer>` name this checkpoint, in one atomic replacement."""
    with atomic_file(output / FOLDER / pointer) as temporary:
        temporary.write_text(pointer_text(target), encoding="utf-8")


def check_space(output: Path, num_parameters: int) -> None:
    """Raise UserError if the disk has no space for one more checkpoint of a model of this size."""
    check_free(output, num_parameters * _BYTES_PER_PARAMETER * _SPACE_MARGIN)


def check_free(output: Path, needed: float) -> None:
    """Raise UserError if the disk has less than `needed` bytes for a checkpoint."""
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"{output}: {free / 2**30:.3g} GiB free, one checkpoint takes {needed / 2**30:.3g} GiB: free some, or use another "
            "--output"
        )


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write_folder(
    target: Path, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], state: dict[str, Any]
) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _save_tensors(weights, temporary / MODEL_FILE)
        _save_tensors(moments, temporary / MOMENTS_FILE)
        write_json(temporary / STATE_FILE, state)
        names = (MODEL_FILE, MOMENTS_FILE, STATE_FILE)
        files = {n: {"bytes": (temporary / n).stat().st_size, "sha256": file_sha256(temporary / n)} for n in names}
        write_json(temporary / COMPLETE, {"step": state["step"], "files": files})
        if target.exists():  # the same step again, after a damaged or interrupted run
            shutil.rmtree(target)
        os.rename(temporary, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except Exception as error:  # safetensors wraps the system's errors in its own type
        raise OSError(f"{path.name}: {error}") from error
    follow_umask(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _best(output: Path) -> Path | None:
    try:
        name, _ = pointer_fields(output, "best")
    except UserError:
        return None
    folder = output / FOLDER / name if name else None
    return folder if folder and folder.is_dir() else None


def _prune(output: Path, keep: int, newest: Path, best_step: int | None) -> None:
    """Remove old checkpoints.

    The last `keep` ones up to `newest` and the best one are kept. Checkpoints later than `newest` are removed: they
    were unusable, since otherwise the run would have resumed from them. If "best" names one of these, it is pointed at
    the checkpoint of `best_step`, or removed if there is none.
    """
    found, best = checkpoint.all_checkpoints(output), _best(output)
    later = [folder for folder in found if folder.name > newest.name]
    if best in later:
        best = next((folder for folder in found if folder.name == checkpoint.folder_name(best_step or 0)), None)
        if best:
            point_to(output, "best", best)
        else:
            (output / FOLDER / "best").unlink()
    kept = [folder for folder in found if folder not in later][:keep]
    for old in found:
        if old not in kept and old != best:
            shutil.rmtree(old, ignore_errors=True)
