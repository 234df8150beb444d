"""Checks of the arguments of the Python interface: device, precision, counts, ranges and scores."""

from typing import Literal

import numpy as np
import torch

from opt_ds.errors import UserError, did_you_mean

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_AMPERE = (8, 0)  # compute capability of the first GPUs with bf16

Score = Literal["matching", "likelihood"]


def parse_device(device: str) -> torch.device:
    """Return the device for "auto", "cpu", "cuda" or "cuda:N". Raise UserError for another word or an absent GPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        known = ("auto", "cpu", "cuda", "cuda:0")
        raise UserError(f'device "{device}": choose auto, cpu, cuda or cuda:N{did_you_mean(device, known)}')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        raise UserError(f'device "{device}": this PyTorch sees {count} GPUs: choose another one, or cpu')
    return found


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype for "auto", "fp32", "bf16" or "fp16". Raise UserError if the device cannot compute in it."""
    known = ("auto", *_DTYPES)
    if precision not in known:
        raise UserError(f'precision "{precision}": choose {", ".join(known)}{did_you_mean(precision, known)}')
    has_bf16 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= _AMPERE
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if has_bf16 else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 does not run on the CPU: use fp32 or bf16")
    if precision == "bf16" and not has_bf16:
        raise UserError("precision bf16: this GPU is older than Ampere: use fp16 or fp32")
    return _DTYPES[precision]


def check_count(name: str, value: int) -> None:
    """Raise UserError for a value that is not a whole number of at least 1."""
    check_range(name, value, 1, None)
    if not isinstance(value, (int, np.integer)):
        raise UserError(f"{name}: {value}: give a whole number")


def check_range(name: str, value: float, least: float, most: float | None) -> None:
    """Raise UserError for a value outside the range (`most` None: no upper end), of another type, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise UserError(f"{name}: expected a number, got {type(value).__name__}")
    if not np.isfinite(value) or value < least or (most is not None and value > most):
        raise UserError(f"{name} {value}: give {f'at least {least:g}' if most is None else f'{least:g} to {most:g}'}")


def check_score(by: str) -> str:
    """Return `by` if it names a score. Raise UserError otherwise."""
    known = ("matching", "likelihood")
    if by not in known:
        raise UserError(f'by="{by}": choose {" or ".join(known)}{did_you_mean(by, known)}')
    return by
