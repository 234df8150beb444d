"""The kernel of each operator. It is chosen once, logged and stored with the run. Only `opt_ds.ops` depends on it.

    torch      plain PyTorch, on every device; its dropout uses PyTorch's generator
    fused      our kernels (csrc/): one CUDA kernel per operator, and the reference on the CPU. Dropout is a function of
               (seed, step, layer, sample, position), so it does not depend on ranks and micro-batches
    apex       NVIDIA's apex for LayerNorm, where it is installed (CUDA only)
    emulator   our CUDA kernels, run on the CPU thread by thread; slow, to test the kernels inside a model

`auto` takes the fastest backend that is available and correct for the device, per operator. On a GPU
the order is fused, apex, torch. On the CPU it is torch (measured: benchmarks/README.md).
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
    """Choose the backend of every operator and return operator -> kernel.

    Args:
        name: The name of a backend, or several as "layer_norm=fused,attention=torch". Operators not named use `auto`.
        device: Where the tensors will be. None: the GPU if there is one.

    Raises:
        UserError: A name is unknown, or a backend that was named explicitly cannot run here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    _reasons.clear()
    chosen = {operator: _resolve(operator, backend, device) for operator, backend in _parse(name).items()}
    _chosen.update(chosen)
    return describe()


def describe() -> dict[str, str]:
    """Return operator -> kernel in use."""
    return dict(_chosen) if _chosen else choose()


def reasons() -> list[str]:
    """Return why `auto` did not use a faster backend, one line per operator."""
    return list(_reasons)


def chosen(operator: str) -> str:
    """Return the backend of one operator. If no choice was made, make the `auto` choice first."""
    return _chosen[operator] if _chosen else choose()[operator]


def library(operator: str) -> str | None:
    """Return the compiled library of an operator; None for torch and apex."""
    return {"fused": "opt_ds", "emulator": "opt_ds_emulator"}.get(chosen(operator))


def seed_dropout(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Make the dropout of the next forward pass deterministic.

    Instead of rank and micro-batch, our dropout is keyed by the sample's index in the global batch. It therefore does
    not depend on how samples are distributed.

    Args:
        seed: The seed of the run. Keys both PyTorch's dropout and ours.
        step: The optimiser step. Keys both.
        rank: The data-parallel rank. Keys PyTorch's dropout only.
        micro_batch: The index of the micro-batch within the step. Keys PyTorch's dropout only.
    """
    global _dropout_key
    torch.manual_seed(int(keyed_hash(seed, "dropout", step, rank, micro_batch)) & (2**63 - 1))
    _dropout_key = int(keyed_hash(seed, "dropout", step)) & (2**63 - 1)


def dropout_key() -> int:
    """Return the key of our dropout in the current step."""
    return _dropout_key


def _parse(name: str) -> dict[str, str]:
    """Parse "fused" or "layer_norm=apex,attention=torch" to operator -> backend."""
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
        return "torch"  # apex has no kernel for the other operators
    reason = _missing(operator, backend, device)
    if reason:
        raise UserError(f'ops.backend "{backend}" cannot run {operator} here: {reason}')
    return backend


def _missing(operator: str, backend: str, device: torch.device) -> str:
    """Return why a backend cannot serve an operator on a device; "" if it can."""
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
    """Return why NVIDIA's apex cannot be used; "" if it can. PyPI's package named apex is a different project."""
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
