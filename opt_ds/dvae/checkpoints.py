"""What the checkpoints of a dVAE's run hold, and how the run resumes from them.

They have the format of every run (`opt_ds.training.checkpoint`). Runs of earlier versions saved one file, which is
still read.
"""

import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from opt_ds.dvae.model import DiscreteVAE
from opt_ds.errors import UserError
from opt_ds.training import checkpoint
from opt_ds.training.checkpoint_files import MOMENTS_FILE, check_file
from opt_ds.training.run_folder import DVAE, OLD_DVAE_CHECKPOINT

_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class DVAEState:
    """Progress of a run, apart from weights and moments."""

    step: int = 0  # completed optimiser steps, and so the index of the next one
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    start_psnr_db: float = 0.0  # of the codebook before training


def parameters(dvae: DiscreteVAE, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield each parameter's name, and its weight and Adam state. A parameter without an update has no Adam state."""
    for name, parameter in dvae.named_parameters():
        yield name, {"weight": parameter.detach(), **optimizer.state.get(parameter, {})}


def resume(
    output: Path, dvae: DiscreteVAE, optimizer: torch.optim.Optimizer, last_step: int
) -> tuple[DVAEState, str] | None:
    """Load the newest complete checkpoint of the run in `output` into a dVAE and its optimizer.

    Return the progress and the checkpoint's name, or None if there is no checkpoint. Raise UserError if there are only
    damaged ones.
    """
    folder, old = checkpoint.find_resumable(output), output / OLD_DVAE_CHECKPOINT
    if folder is not None:
        state = checkpoint.state_as(DVAEState, checkpoint.read_state(folder, DVAE))
        checkpoint.load_weights(dvae, folder)
        _load_adam(dvae, optimizer, folder)
    elif old.is_file():
        state = _load_old(old, dvae, optimizer)
    else:
        return None
    if not 0 <= state.step <= last_step:
        raise UserError(f"{folder or old}: damaged checkpoint, of step {state.step} of {last_step}: remove it")
    return state, (folder or old).name


@torch.no_grad()
def _load_adam(dvae: DiscreteVAE, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    with safe_open(check_file(folder, MOMENTS_FILE), "pt") as file:
        held = set(file.keys())
        for name, parameter in dvae.named_parameters():
            found = {key: file.get_tensor(f"{name}.{key}") for key in _ADAM_STATE if f"{name}.{key}" in held}
            shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
            if found and shapes != {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}:
                raise UserError(f"checkpoint {folder}: the moments of {name} are of another model: use another checkpoint")
            if found:
                optimizer.state[parameter] = {
                    "step": found["step"].to(parameter.device),
                    **{key: torch.empty_like(parameter).copy_(found[key]) for key in _ADAM_STATE[1:]},
                }


def _load_old(file: Path, dvae: DiscreteVAE, optimizer: torch.optim.Optimizer) -> DVAEState:
    """Load a checkpoint in the former format: one file, written by `torch.save`."""
    damaged = UserError(f"{file}: damaged checkpoint: remove it to start the run again")
    # The archive has a CRC-32 per part. PyTorch does not check all of them.
    if not zipfile.is_zipfile(file) or _damaged_part(file) is not None:
        raise damaged
    try:
        saved = torch.load(file, map_location=next(dvae.parameters()).device, weights_only=True)
        dvae.load_state_dict(saved["dvae"])
        optimizer.load_state_dict(saved["optimizer"])
        return DVAEState(
            int(saved["step"]), float(saved["seconds"]), float(saved["cpu_seconds"]), float(saved["start_psnr_db"])
        )
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise damaged from None


def _damaged_part(archive: Path) -> str | None:
    try:
        with zipfile.ZipFile(archive) as parts:
            return parts.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        return str(error)
