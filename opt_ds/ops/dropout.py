"""Dropout of packed rows, and a faster form of PyTorch's dropout on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from opt_ds.ops import backend
from opt_ds.ops.sequences import Sequences

_device_to_act_as: str | None = None


def dropout(x_te: torch.Tensor, probability: float, rows: Sequences | None, layer_id: int = 0) -> torch.Tensor:
    """Keep each element of [t, e] with probability 1 − p and scale it by 1 / (1 − p).

    Args:
        x_te: Packed rows [t, e].
        probability: Dropout probability p. With 0, as in evaluation, x_te itself is returned.
        rows: The sequences that the rows belong to. A compiled backend requires them.
        layer_id: Dropout layer id. Each layer has its own random bits.

    Returns:
        [t, e], in the dtype of x_te.
    """
    if probability == 0.0:
        return x_te
    library = backend.library("dropout")
    if library is None:
        return generator_dropout(x_te, probability)
    assert rows is not None, "dropout of a compiled backend is keyed by the rows' sequences"
    return getattr(torch.ops, library).dropout(x_te, rows.row_keys, probability, backend.dropout_key(), layer_id)


def generator_dropout(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Apply dropout with bits from PyTorch's generator, to a tensor of any shape.

    On the CPU PyTorch generates one double per element, which takes a tenth of a training step. This function uses 16
    bits per element. The probability is therefore rounded to a multiple of 2⁻¹⁶, and the scale matches the rounded
    probability.
    """
    if kind_of_device(x) != "cpu":
        return F.dropout(x, probability, training=True)
    kept = 2**16 - round(probability * 2**16)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None).view(torch.int16)
    return x * _zero_or(2**16 / kept, bits[: x.numel()].view(x.shape).lt_(kept - 2**15), x.dtype)


def _zero_or(scale: float, is_kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `scale` where int16 `is_kept` is 1, and 0 elsewhere. May overwrite `is_kept`.

    Comparisons and products of integers of one width are vectorised, conversions from bool are not. 16-bit floats are
    therefore built from their bit patterns.
    """
    if dtype.itemsize != 2:
        return is_kept.to(dtype).mul_(scale)
    return is_kept.mul_(torch.tensor(scale, dtype=dtype, device=is_kept.device).view(torch.int16)).view(dtype)


def kind_of_device(x: torch.Tensor) -> str:
    """Return the tensor's device type, "cpu" or "cuda". Inside `acting_as`, return the device type given there."""
    return _device_to_act_as or x.device.type


@contextmanager
def acting_as(device: str) -> Iterator[None]:
    """Let operators behave as on this device type. For meta tensors, which stand for tensors of that device."""
    global _device_to_act_as
    former, _device_to_act_as = _device_to_act_as, device
    try:
        yield
    finally:
        _device_to_act_as = former
