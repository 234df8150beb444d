"""Which kernel each operator uses: chosen once, said once, stored with the run. Nobody outside `opt_ds.ops` needs to know.

    torch      plain PyTorch, on every device; its dropout draws from PyTorch's generator
    fused      ours (csrc/): one CUDA kernel per operator; on the CPU their reference. Dropout is a function of (seed, step, site,
               sample, position), the same whatever the ranks and micro-batches
    apex       NVIDIA's apex for LayerNorm, where it is installed (CUDA only)
    emulator   ours, the CUDA kernels run on the CPU thread by thread: to see the kernels drive a model, slowly

`auto` takes, operator by operator, the fastest that is there and right for the device: on a GPU fused, then apex, then torch;
on the CPU torch (measured: benchmarks/README.md).
"""

import functools
import importlib

import torch

from opt_ds.errors import UserError, did_you_mean
from opt_ds.ops import compiled
from opt_ds.ops.keyed import keyed_hash

OPERATORS = ("layer_norm", "attention", "dropout")
BACKENDS = ("torch", "fused", "apex", "emulator")
_ORDER = {"cuda": ("fused", "apex", "torch"), "cpu": ("torch",)}

_chosen: dict[str, str] = {}
_reasons: list[str] = []
_dropout_key = 0


def choose(name: str = "auto", device: torch.device | str | None = None) -> dict[str, str]:
    """Choose the backend of every operator: a backend's name, or several as "layer_norm=fused,attention=torch" (others: auto).

    `device`: where the tensors will be; None: the GPU if there is one. Raises UserError, one line, for a name that is unknown and
    for a backend that is asked for and cannot run here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    _reasons.clear()
    chosen = {operator: _resolve(operator, backend, device) for operator, backend in _parse(name).items()}
    _chosen.update(chosen)
    return describe()


def describe() -> dict[str, str]:
    """Operator -> the kernel in use."""
    return dict(_chosen) if _chosen else choose()


def reasons() -> list[str]:
    """Why `auto` passed over a faster backend, a line each."""
    return list(_reasons)


def chosen(operator: str) -> str:
    """The backend of one operator; `auto` if nobody has chosen."""
    return _chosen[operator] if _chosen else choose()[operator]


def library(operator: str) -> str | None:
    """The compiled library that serves an operator, or None for torch and apex."""
    return {"fused": "opt_ds", "emulator": "opt_ds_emulator"}.get(chosen(operator))


def seed_dropout(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Make the dropout of the coming forward pass a pure function: PyTorch's of (seed, step, rank, micro-batch), ours of (seed,
    step) and of the place in the global batch."""
    global _dropout_key
    torch.manual_seed(int(keyed_hash(seed, "dropout", step, rank, micro_batch)) & (2**63 - 1))
    _dropout_key = int(keyed_hash(seed, "dropout", step)) & (2**63 - 1)


def dropout_key() -> int:
    """The key of our dropout in this step."""
    return _dropout_key


def _parse(name: str) -> dict[str, str]:
    """ "fused" or "layer_norm=apex,attention=torch" -> operator: backend."""
    if "=" not in name:
        return dict.fromkeys(OPERATORS, _known(name, ("auto", *BACKENDS)))
    wanted = dict.fromkeys(OPERATORS, "auto")
    for part in name.split(","):
        operator, _, backend = part.strip().partition("=")
        if operator not in OPERATORS:
            raise UserError(
                f'ops.backend names no operator "{operator}"{did_you_mean(operator, OPERATORS)}: use {", ".join(OPERATORS)}'
            )
        wanted[operator] = _known(backend, ("auto", *BACKENDS))
    return wanted


def _known(name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise UserError(f'ops.backend "{name}" is unknown{did_you_mean(name, names)}: use {", ".join(names[:-1])} or {names[-1]}')
    return name


def _resolve(operator: str, backend: str, device: torch.device) -> str:
    if backend == "auto":
        for candidate in _ORDER.get(device.type, ("torch",)):
            reason = _missing(operator, candidate, device)
            if not reason:
                return candidate
            if candidate == "fused":
                _reasons.append(f"{operator}: our kernel is not used: {reason}")
        return "torch"
    if backend == "apex" and operator != "layer_norm":
        return "torch"  # apex has no other operator of ours
    reason = _missing(operator, backend, device)
    if reason:
        raise UserError(f'ops.backend "{backend}" cannot run {operator} here: {reason}')
    return backend


def _missing(operator: str, backend: str, device: torch.device) -> str:
    """Why a backend cannot serve an operator on a device; "" if it can."""
    if backend == "torch":
        return ""
    if backend == "fused":
        return compiled.missing_on(device)
    if backend == "emulator":
        return compiled.load("opt_ds_emulator") or ("" if device.type == "cpu" else "the emulator runs on the CPU")
    if operator != "layer_norm":
        return "apex has no such operator"
    return apex_missing() or ("" if device.type == "cuda" else "apex runs on CUDA only")


@functools.cache
def apex_missing() -> str:
    """Why NVIDIA's apex cannot be used; PyPI's package of that name is something else."""
    try:
        importlib.import_module("apex")
    except ImportError:
        return "apex is not installed"
    try:
        importlib.import_module("fused_layer_norm_cuda")
        importlib.import_module("apex.normalization")
    except ImportError:
        return (
            "the installed apex is not NVIDIA's, or was built without its CUDA extensions: build it from github.com/NVIDIA/apex"
        )
    return ""
