"""The step plan's compiled operators (csrc/step_plan.cpp). They return the same bits as the NumPy forms, but faster."""

import functools
from typing import Any

import numpy as np


@functools.cache
def plan_operators() -> Any:
    """Return the operators `keyed_hash`, `permute` and `distribute`; None if the extension is not built."""
    import torch

    from opt_ds.ops import compiled

    return None if compiled.load() else torch.ops.opt_ds


def as_tensor(array: np.ndarray) -> Any:
    """Return the array, flattened and contiguous, as a tensor. uint64 becomes int64 with the same bits.

    Copy only if necessary.
    """
    import torch

    flat = np.require(array, requirements=("C", "W")).reshape(-1)  # PyTorch warns about read-only memory
    return torch.from_numpy(flat.view(np.int64) if flat.dtype == np.uint64 else flat)
