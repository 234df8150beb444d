"""One canonical checkpoint, whatever the rank count, ZeRO stage and precision: complete, or not there at all.

    <output>/checkpoints/step-00001000/
        model.safetensors     fp32 master weights by parameter name, and the model's buffers
        moments.safetensors   Adam's exp_avg and exp_avg_sq, as "<parameter>.exp_avg"
        state.json            step, Adam's updates, loss scale, best validation, config, plan version, stores, versions
        COMPLETE.json         size and SHA-256 of each of these; written last
    <output>/checkpoints/latest, best    text files that name a folder

A checkpoint is written into a temporary folder, flushed to disk, and renamed. Nothing of a random number generator is
in it: the plan and dropout are functions of (seed, step).
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from opt_ds.config import Config, config_from_dict
from opt_ds.engine.distributed import ProcessGroup
from opt_ds.errors import UserError
from opt_ds.store.files import atomic_file, file_sha256, sync_folder, write_json

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from opt_ds.model.opt import OPT

FOLDER = "checkpoints"
COMPLETE = "COMPLETE.json"
MODEL_FILE, MOMENTS_FILE, STATE_FILE = "model.safetensors", "moments.safetensors", "state.json"
_BYTES_PER_PARAMETER = 12  # fp32 weight and two moments


@dataclass
class TrainState:
    """Where a run stands, besides weights and moments."""

    step: int = 0  # optimiser steps behind us; the next one has this number
    best_loss: float | None = None  # weighted validation loss
    best_step: int | None = None
    validations_without_gain: int = 0
    stopped_early: bool = False
    train_seconds: float = 0.0
    adam_steps: int = 0  # less than step where an overflow skipped the update
    scaler: dict[str, float] = field(default_factory=dict)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


# ---- writing


def save(
    output: Path, engine: "DeepSpeedEngine", state: TrainState, about: dict[str, Any], group: ProcessGroup, keep: int
) -> Path:
    """Write the checkpoint of `state.step` and point `latest` to it. A collective call; rank 0 writes.

    `about` (config, plan version, stores, versions) goes into state.json. Keeps the last `keep` and the best.
    Raises CheckpointError on every rank when writing fails.
    """
    from opt_ds.engine import optimizer_state  # needs DeepSpeed, which reading a checkpoint does not

    state.adam_steps, state.scaler = optimizer_state.adam_steps(engine), optimizer_state.scaler_state(engine)
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    for name, tensors in optimizer_state.gather(engine):
        if group.ranks.is_main:
            weights[name] = tensors["weight"].float().cpu().contiguous()
            moments.update({f"{name}.{key}": tensors[key].cpu().contiguous() for key in optimizer_state.MOMENTS})
    target, problem = output / FOLDER / folder_name(state.step), None
    if group.ranks.is_main:
        try:
            weights.update({name: buffer.cpu().contiguous() for name, buffer in _buffers(engine.module).items()})
            _write(target, weights, moments, {**asdict(state), **about})
            point_to(output, "latest", target)
            _prune(output, keep)
        except OSError as error:
            problem = (
                f"checkpoint {target} could not be written ({error.strerror or error}): free space, then start again"
            )
    problem = group.from_main(problem)
    if problem:
        raise CheckpointError(problem)
    return target


def folder_name(step: int) -> str:
    """Name of the checkpoint folder after so many steps."""
    return f"step-{step:08d}"


def point_to(output: Path, pointer: str, target: Path) -> None:
    """Make `checkpoints/<pointer>` name this checkpoint, in one atomic replacement."""
    with atomic_file(output / FOLDER / pointer) as temporary:
        temporary.write_text(target.name + "\n", encoding="utf-8")


def check_space(output: Path, num_parameters: int) -> None:
    """Raise UserError when the disk cannot hold one more checkpoint of a model of this size."""
    needed = num_parameters * _BYTES_PER_PARAMETER * 1.05
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"{output}: {free / 2**30:.1f} GiB free, one checkpoint takes {needed / 2**30:.1f} GiB: free some, or "
            "use another --output"
        )


def _write(
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
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _prune(output: Path, keep: int) -> None:
    best = _pointed(output, "best")
    for old in all_checkpoints(output)[keep:]:
        if old != best:
            shutil.rmtree(old, ignore_errors=True)


# ---- reading


def all_checkpoints(output: Path) -> list[Path]:
    """The output directory's checkpoint folders, the newest first, whole or not."""
    return sorted((output / FOLDER).glob("step-*"), reverse=True)


def problem_with(folder: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, None if nothing: a missing or cut-off file, or (with `hashes`) a changed one."""
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"no readable {COMPLETE}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} is cut off ({path.stat().st_size} of {expected['bytes']} bytes)"
        if hashes and file_sha256(path) != expected["sha256"]:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def find_resumable(output: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; None where there is none at all. Damaged newer ones are named through `say`.

    Raises UserError when there are checkpoints and all are damaged: starting anew is the user's choice.
    """
    found = all_checkpoints(output)
    problems: list[tuple[Path, str]] = []
    for folder in found:
        problem = problem_with(folder)
        if problem is None:
            for other, text in problems:
                say(f"checkpoint {other} is not usable: {text}; taking {folder.name}, the one before it")
            if not (output / FOLDER / "latest").is_file():
                say(f'{output / FOLDER}: no pointer "latest"; taking {folder.name}, the newest that is whole')
            return folder
        problems.append((folder, problem))
    if found:
        raise UserError(
            f"{output / FOLDER}: no checkpoint is usable ({'; '.join(f'{f.name}: {p}' for f, p in problems)}): "
            "restore one, or start anew with another --output"
        )
    return None


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `--checkpoint PATH` means: itself, or the best (else the latest) of a run's output directory.

    Raises UserError when there is none or a file of it is missing or cut off.
    """
    path = Path(path)
    folder: Path | None = path
    if not (path / COMPLETE).is_file():
        folder = _pointed(path, "best") or _pointed(path, "latest") or next(iter(all_checkpoints(path)), None)
    if folder is None or not folder.is_dir():
        raise UserError(f"{path}: neither a checkpoint nor a run's output directory with one: train first")
    problem = problem_with(folder, hashes=False)
    if problem:
        raise UserError(f"checkpoint {folder}: {problem}: use another one of the run")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def train_state(saved: dict[str, Any]) -> TrainState:
    """The TrainState in a state.json."""
    return TrainState(**{name: saved[name] for name in TrainState.__dataclass_fields__})


@torch.no_grad()
def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy a checkpoint's weights and buffers into a model of the same shape. Raises UserError for another shape."""
    own = {**dict(model.named_parameters()), **_buffers(model)}
    with safe_open(folder / MODEL_FILE, "pt") as file:
        saved = set(file.keys())
        for name, tensor in own.items():
            shape = tuple(file.get_slice(name).get_shape()) if name in saved else None
            if shape != tuple(tensor.shape):
                raise UserError(
                    f"checkpoint {folder}: {name} is {shape or 'missing'}, the model's is {tuple(tensor.shape)}: it "
                    "belongs to another model"
                )
            tensor.copy_(file.get_tensor(name))


def load_optimizer(engine: "DeepSpeedEngine", folder: Path) -> None:
    """Put master weights, moments, Adam's step count and the loss scale of a checkpoint into a fresh engine.

    The engine must have been made from a model that went through `load_weights` with the same folder.
    """
    from opt_ds.engine import optimizer_state

    state = train_state(read_state(folder))
    optimizer_state.create_moments(engine, state.adam_steps)
    with safe_open(folder / MODEL_FILE, "pt") as weights, safe_open(folder / MOMENTS_FILE, "pt") as moments:

        def read(name: str, key: str) -> torch.Tensor:
            return weights.get_tensor(name) if key == "weight" else moments.get_tensor(f"{name}.{key}")

        optimizer_state.scatter(engine, read, ("weight", *optimizer_state.MOMENTS))
    optimizer_state.set_scaler_state(engine, state.scaler)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple["OPT", Config]:
    """The trained model (fp32, in evaluation mode) and its configuration, from a run's directory or one checkpoint."""
    from opt_ds.model.opt import OPT

    folder = resolve_checkpoint(path)
    config = config_from_dict(read_state(folder)["config"], where=f"{folder / STATE_FILE}")
    model = OPT(config.model, config.tasks)
    load_weights(model, folder)
    return model.to(device).eval(), config


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Persistent buffers by name."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if not isinstance(value, torch.nn.Parameter)}


def _pointed(output: Path, pointer: str) -> Path | None:
    try:
        folder = output / FOLDER / (output / FOLDER / pointer).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return folder if folder.is_dir() else None
