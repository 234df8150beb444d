"""Dropout of packed rows, and PyTorch's dropout made fast on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from opt_ds.ops import backend
from opt_ds.ops.sequences import Sequences

_device_to_act_as: str | None = None


def dropout(x_te: torch.Tensor, probability: float, rows: Sequences | None, site: int = 0) -> torch.Tensor:
    """Elements kept with 1 − probability and scaled by its inverse (training only: probability 0 gives x_te itself); [t, e].

    `rows`: the sequences that the rows belong to. `site`: which dropout of the model this is; each has its own bits.
    """
    if probability == 0.0:
        return x_te
    library = backend.library("dropout")
    if library is None:
        return generator_dropout(x_te, probability)
    assert rows is not None, "dropout of a compiled backend is keyed by the rows' sequences"
    return getattr(torch.ops, library).dropout(x_te, rows.row_keys, probability, backend.dropout_key(), site)


def generator_dropout(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Dropout whose bits PyTorch's generator draws; any shape.

    On the CPU PyTorch draws a double an element, a tenth of a training step. Here 16 bits an element decide, so the probability
    is a multiple of 2⁻¹⁶; the scale is that of the multiple.
    """
    if kind_of_device(x) != "cpu":
        return F.dropout(x, probability, training=True)
    kept = 2**16 - round(probability * 2**16)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None).view(torch.int16)
    return x * _zero_or(2**16 / kept, bits[: x.numel()].view(x.shape).lt_(kept - 2**15), x.dtype)


def _zero_or(scale: float, is_kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` where int16 `is_kept` is 1, else 0; it may overwrite it.

    Integers of one width are compared and multiplied in vectors, where conversions of bools are not: so 16-bit floats are made of
    their bits.
    """
    if dtype.itemsize != 2:
        return is_kept.to(dtype).mul_(scale)
    return is_kept.mul_(torch.tensor(scale, dtype=dtype, device=is_kept.device).view(torch.int16)).view(dtype)


def kind_of_device(x: torch.Tensor) -> str:
    """The tensor's kind of device, "cpu" or "cuda"; of a tensor without content the one that it stands for."""
    return _device_to_act_as or x.device.type


@contextmanager
def acting_as(device: str) -> Iterator[None]:
    """While entered, operators do as on this kind of device: for tensors without content that stand for it."""
    global _device_to_act_as
    former, _device_to_act_as = _device_to_act_as, device
    try:
        yield
    finally:
        _device_to_act_as = former
