"""Dataclasses of tensors that move between devices together."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from opt_ds.ops.sequences import Sequences


@dataclass
class Movable:
    """Base class of dataclasses whose tensors move to a device together."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        """Return a copy whose tensors, including nested ones, are on the device."""
        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(part) for name, part in value.items()}
            if isinstance(value, (torch.Tensor, Movable, Sequences)):
                return value.to(device, non_blocking=non_blocking)
            return value

        return dataclasses.replace(self, **{f.name: moved(getattr(self, f.name)) for f in dataclasses.fields(self)})


def map_tensors(value: Any, function: Any) -> Any:
    """Return a copy of a batch, or of part of one, with the function applied to each of its tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(part, function) for name, part in value.items()}
    if isinstance(value, (Movable, Sequences)):
        fields = {f.name: map_tensors(getattr(value, f.name), function) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
