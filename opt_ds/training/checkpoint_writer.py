"""Asynchronous checkpoint writer.

Training waits only for the copy to host memory; a thread of rank 0 writes it to disk.

A checkpoint is written to a temporary folder, flushed to disk and renamed. Then the pointers are replaced and old
checkpoints are removed. At most one checkpoint is being written: the next `save` and the end of the run wait for it.
"""

import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from opt_ds.errors import UserError
from opt_ds.store.files import atomic_file, file_sha256, follow_umask, sync_folder, write_json
from opt_ds.training import checkpoint
from opt_ds.training.checkpoint import COMPLETE, FOLDER, MODEL_FILE, MOMENTS_FILE, STATE_FILE, TrainState
from opt_ds.training.checkpoint_files import pointer_fields, pointer_text
from opt_ds.training.distributed import ProcessGroup

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_BYTES_PER_PARAMETER = 12  # fp32 weight and two moments
_SPACE_MARGIN = 1.05


class CheckpointError(UserError):
    """A checkpoint could not be written. Earlier checkpoints are unchanged."""


class CheckpointWriter:
    """Writer of a run's checkpoints. `save` and `wait` are collective calls; rank 0 writes.

    `about` (config, plan version, stores, versions) is stored in every state.json. The last `keep` checkpoints and the
    best one are kept.
    """

    def __init__(self, output: Path, group: ProcessGroup, keep: int, about: dict[str, Any]) -> None:
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

    def save(self, engine: "DeepSpeedEngine", state: TrainState, best: bool = False) -> Path:
        """Copy weights and moments to host memory and start writing the checkpoint of `state.step`.

        Return its future folder.

        Raise CheckpointError on every rank if the previous checkpoint could not be written or the disk has no space for
        this one.
        """
        # Imported here because readers of checkpoints do not need DeepSpeed.
        from opt_ds.training import deepspeed_internals, optimizer_state

        began = time.perf_counter()
        self.wait()
        state.adam_steps, state.scaler = optimizer_state.adam_steps(engine), deepspeed_internals.scaler_state(engine)
        weights: dict[str, torch.Tensor] = {}
        moments: dict[str, torch.Tensor] = {}
        for name, tensors in optimizer_state.gather(engine):
            if self._group.ranks.is_main:
                weights[name] = _copy(tensors["weight"]).float()
                moments.update({f"{name}.{key}": _copy(tensors[key]) for key in optimizer_state.MOMENTS})
        target = self._output / FOLDER / checkpoint.folder_name(state.step)
        problem = None
        if self._group.ranks.is_main:
            weights.update({name: _copy(buffer) for name, buffer in checkpoint.buffers_of(engine.module).items()})
            needed = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values())) * _SPACE_MARGIN
            problem = _no_room(self._output, needed)
            if problem is None:
                pointers = ("latest", "best") if best else ("latest",)
                described = {**asdict(state), **self._about}
                self._writing = self._thread.submit(self._write, target, weights, moments, described, pointers)
        self._raise_everywhere(problem)
        self.stall_s = time.perf_counter() - began
        return target

    def wait(self) -> None:
        """Wait until no checkpoint is being written. Raise CheckpointError on every rank if writing failed."""
        problem = None
        if self._writing is not None:
            try:
                self._writing.result()
            except OSError as error:
                problem = f"checkpoint {error}: free space, then start again"
            self._writing = None
        self._raise_everywhere(problem)

    def close(self) -> None:
        """Wait for the writer thread to end, whether or not it succeeds."""
        self._thread.shutdown(wait=True)

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
            _prune(self._output, self._keep, target, state["best_step"])
        except OSError as error:
            raise OSError(f"{target} could not be written ({error.strerror or error})") from error
        self.write_s = time.perf_counter() - began


def point_to(output: Path, pointer: str, target: Path) -> None:
    """Make `checkpoints/<pointer>` name this checkpoint, in one atomic replacement."""
    with atomic_file(output / FOLDER / pointer) as temporary:
        temporary.write_text(pointer_text(target), encoding="utf-8")


def check_space(output: Path, num_parameters: int) -> None:
    """Raise UserError if the disk has no space for one more checkpoint of a model of this size."""
    problem = _no_room(output, num_parameters * _BYTES_PER_PARAMETER * _SPACE_MARGIN)
    if problem:
        raise UserError(problem)


def _no_room(output: Path, needed: float) -> str | None:
    free = shutil.disk_usage(output).free
    if free >= needed:
        return None
    return (
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
