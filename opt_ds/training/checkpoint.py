"""Canonical checkpoints: one format for every rank count, ZeRO stage and precision.

A checkpoint is complete or absent.

    <output>/checkpoints/step-00001000/
        model.safetensors     fp32 master weights by parameter name, and the model's buffers
        moments.safetensors   Adam's exp_avg and exp_avg_sq, as "<parameter>.exp_avg"
        state.json            step, Adam's updates, loss scale, best validation, config, plan version, stores, versions
        COMPLETE.json         size and SHA-256 of each of these files; written last
    <output>/checkpoints/latest, best    text files: the name of a folder, and the SHA-256 of its COMPLETE.json

This module finds and reads checkpoints. `checkpoint_files` checks that they are complete and `checkpoint_writer` writes
them. Every file is compared with its recorded hash before it is read. A checkpoint holds no random number generator
state, because the step plan and dropout are functions of (seed, step).
"""

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open

from opt_ds.config import Config, config_from_dict
from opt_ds.errors import UserError
from opt_ds.store.foreign import read_json_object, tensor_shapes
from opt_ds.store.seal import SEAL_FILE
from opt_ds.training.checkpoint_files import (
    COMPLETE,
    FOLDER,
    MODEL_FILE,
    MOMENTS_FILE,
    STATE_FILE,
    check_file,
    check_size,
    pointed,
    pointer_fields,
    problem_with,
    read_record,
)
from opt_ds.training.run_folder import MODEL, refuse_dvae

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from deepspeed import DeepSpeedEngine

    from opt_ds.model.opt import OPT

_LOG = logging.getLogger(__name__)
_State = TypeVar("_State", bound="DataclassInstance")
__all__ = [
    "COMPLETE", "FOLDER", "HUB_MODEL_TYPE", "MODEL_FILE", "MOMENTS_FILE", "STATE_FILE", "GuardState", "TrainState",
    "all_checkpoints", "buffers_of", "find_resumable", "folder_name", "is_exported", "load_model", "load_optimizer", "load_start",
    "load_weights", "pointed", "problem_with", "read_record", "read_state", "resolve_checkpoint", "state_as",
    "train_state", "weights_sha256",
]  # fmt: skip

HUB_MODEL_TYPE = "opt_ds"  # `model_type` in the config.json of an exported folder


@dataclass
class GuardState:
    """History that the guard's decisions depend on."""

    losses: list[float] = field(default_factory=list)  # of the last `spike_window` steps
    gradient_norms: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # skipped steps within the last `skip_window`
    num_skipped: int = 0
    num_spikes: int = 0


@dataclass
class TrainState:
    """Progress of a run, apart from weights and moments."""

    step: int = 0  # completed optimiser steps, and so the index of the next one
    best_loss: float | None = None  # weighted validation loss
    best_step: int | None = None
    validations_without_gain: int = 0
    stopped_early: bool = False
    train_seconds: float = 0.0
    adam_steps: int = 0  # less than `step` if an overflow skipped updates
    scaler: dict[str, float] = field(default_factory=dict)
    guard: GuardState = field(default_factory=GuardState)


def folder_name(step: int) -> str:
    """Return the name of the checkpoint folder after `step` steps."""
    return f"step-{step:08d}"


def all_checkpoints(output: Path) -> list[Path]:
    """Return the output directory's checkpoint folders, newest first, complete or not."""
    return sorted((output / FOLDER).glob("step-*"), reverse=True)


def find_resumable(output: Path) -> Path | None:
    """Return the newest complete checkpoint, or None if there are no checkpoints.

    Log a warning for each newer one that is damaged.

    Raises:
        UserError: All checkpoints are damaged (starting from scratch must be the user's choice), or a pointer names
            something that is not a checkpoint.
    """
    for pointer in ("latest", "best"):
        pointer_fields(output, pointer)
    found = all_checkpoints(output)
    problems: list[tuple[Path, str]] = []
    for folder in found:
        problem = problem_with(folder)
        if problem is None:
            for other, text in problems:
                _LOG.warning(f"checkpoint {other} is not usable: {text}; using {folder.name}, the one before it")
            if not (output / FOLDER / "latest").is_file():
                _LOG.warning(f'{output / FOLDER}: no pointer "latest"; using {folder.name}, the newest that is complete')
            return folder
        problems.append((folder, problem))
    if found:
        raise UserError(
            f"{output / FOLDER}: no checkpoint is usable ({'; '.join(f'{f.name}: {p}' for f, p in problems)}): "
            "restore one, or start again with another --output"
        )
    return None


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that `--checkpoint PATH` means.

    It is the folder itself, or the best (else the latest) checkpoint of a run's output directory.

    Raises:
        UserError: There is no checkpoint, one of its files is missing or truncated, the weights or state.json do not
            match their recorded hash, or `path` is an exported folder or a run of the dVAE.
    """
    path = Path(path)
    if is_exported(path):
        raise UserError(f"{path}: an exported model works with generate and serve only: name the run that it was exported from")
    folder: Path | None = path
    if not (path / COMPLETE).is_file():
        folder = pointed(path, "best") or pointed(path, "latest") or next(iter(all_checkpoints(path)), None)
    if folder is None or not folder.is_dir():
        raise UserError(f"{path}: neither a checkpoint nor a run's output directory with one: train first")
    problem = problem_with(folder, (MODEL_FILE, STATE_FILE))
    if problem:
        raise UserError(f"checkpoint {folder}: {problem}: use another one of the run")
    return folder


def run_of(checkpoint: Path) -> Path:
    """Return the output directory of the run that contains a checkpoint.

    Raise UserError if it was copied out of its run.
    """
    folder = checkpoint.resolve()
    if folder.parent.name != FOLDER:
        raise UserError(
            f"{checkpoint}: a checkpoint alone lacks its run's processor folder, which specifies how to read raw files: name the "
            f"run's output directory, or copy the checkpoint to RUN/{FOLDER}/ next to RUN/processor/"
        )
    return folder.parent.parent


def is_exported(path: Path) -> bool:
    """Return whether `opt-ds export` wrote this folder (a model without its run), damaged or not.

    Raise UserError for a run of the dVAE, which has files of the same names.
    """
    refuse_dvae(path)
    if not (path / "config.json").is_file():
        return False
    try:
        return read_json_object(path / "config.json", "").get("model_type") == HUB_MODEL_TYPE or (path / SEAL_FILE).is_file()
    except UserError:
        return (path / MODEL_FILE).is_file()


def weights_sha256(folder: Path) -> str:
    """Return the recorded SHA-256 of a checkpoint's weights. Raise UserError if COMPLETE.json is missing or malformed."""
    return read_record(folder)[1][MODEL_FILE].sha256


def read_state(folder: Path, kind: str = MODEL) -> dict[str, Any]:
    """Return the state.json of a checkpoint.

    Raise UserError if its hash differs, a required field is missing, or it is of a run of another kind.
    """
    file = check_file(folder, STATE_FILE)
    state = read_json_object(file, "use another checkpoint of the run")
    if state.get("kind", MODEL) != kind:
        raise UserError(f"{folder}: a checkpoint of the {state['kind']}, not of the {kind}: name a run of the {kind}")
    expected = {"step": int, "plan_version": int, "config": dict} if kind == MODEL else {"step": int}
    wrong = [name for name, kind in expected.items() if type(state.get(name)) is not kind]
    if not wrong and state["step"] != read_record(folder)[0]:
        wrong = ["step"]
    if wrong:
        raise UserError(f"{file}: damaged, field {wrong[0]}: use another checkpoint of the run")
    return state


def train_state(saved: dict[str, Any]) -> TrainState:
    """Return the TrainState stored in a state.json. Raise UserError if a field is missing or has another type."""
    return state_as(TrainState, saved)


def state_as(kind: type[_State], saved: dict[str, Any]) -> _State:
    """Return the dataclass `kind` stored in a state.json. Raise UserError if a field is missing or has another type."""
    try:
        return TypeAdapter(kind).validate_python({field.name: saved[field.name] for field in fields(kind)})
    except KeyError as error:
        raise UserError(f"{STATE_FILE}: damaged, no field {error.args[0]}: use another checkpoint of the run") from None
    except ValidationError as error:
        field_name = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{STATE_FILE}: damaged, field {field_name}: use another checkpoint of the run") from None


def load_start(model: "OPT", config: Config) -> None:
    """Copy the weights that fine-tuning starts from into the model.

    A head for other labels than the checkpoint's keeps its initialisation. With `finetune.untrained`, all weights do.
    """
    assert config.finetune is not None, "pre-training starts from no checkpoint"
    if config.finetune.untrained:
        return
    folder = Path(config.finetune.checkpoint)
    had = config_from_dict(read_state(folder)["config"], where=str(folder / STATE_FILE)).tasks
    leave = [
        f"{name}."
        for name, unit in config.tasks.units.items()
        if unit.is_optional and not unit.same_head(getattr(had, name, None), getattr(config.tasks, name))
    ]
    load_weights(model, folder, leave=tuple(leave))


@torch.no_grad()
def load_weights(model: torch.nn.Module, folder: Path, leave: str | tuple[str, ...] = ()) -> None:
    """Copy a checkpoint's weights and buffers into a model of the same shape.

    Tensors whose names start with `leave` (or with one of its items) keep their values. Raise UserError if a shape
    differs or the file's hash is not the recorded one.
    """
    file_path = check_file(folder, MODEL_FILE)
    shapes = tensor_shapes(file_path, "use another checkpoint of the run")
    own = {**dict(model.named_parameters()), **buffers_of(model)}
    if leave:
        own = {name: tensor for name, tensor in own.items() if not name.startswith(leave)}
    with safe_open(file_path, "pt") as file:
        for name, tensor in own.items():
            shape = shapes.get(name)
            if shape != tuple(tensor.shape):
                raise UserError(
                    f"checkpoint {folder}: {name} is {shape or 'missing'}, the model's is {tuple(tensor.shape)}: it "
                    "belongs to another model"
                )
            tensor.copy_(file.get_tensor(name))


def load_optimizer(engine: "DeepSpeedEngine", folder: Path) -> None:
    """Load a checkpoint's master weights, moments, Adam's step count and loss scale into a new engine.

    The engine's model must already have been passed to `load_weights` with the same folder.
    """
    from opt_ds.training import deepspeed_internals, optimizer_state

    state = train_state(read_state(folder))
    optimizer_state.create_moments(engine, state.adam_steps)
    with safe_open(folder / MODEL_FILE, "pt") as weights, safe_open(folder / MOMENTS_FILE, "pt") as moments:

        def read(name: str, key: str) -> torch.Tensor:
            return weights.get_tensor(name) if key == "weight" else moments.get_tensor(f"{name}.{key}")

        optimizer_state.scatter(engine, read, ("weight", *optimizer_state.MOMENTS))
    deepspeed_internals.set_scaler_state(engine, state.scaler)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple["OPT", Config]:
    """Return the trained model (fp32, in evaluation mode) and its configuration.

    `path` is a run's output directory or a checkpoint.
    """
    from opt_ds.model.opt import OPT

    folder = resolve_checkpoint(path)
    config = config_from_dict(read_state(folder)["config"], where=f"{folder / STATE_FILE}")
    check_size(config.model, tensor_shapes(folder / MODEL_FILE, "use another checkpoint of the run"), f"{folder / STATE_FILE}")
    model = OPT(config.model, config.tasks)
    load_weights(model, folder)
    return model.to(device).eval(), config


def buffers_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's persistent buffers by name."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if not isinstance(value, torch.nn.Parameter)}
