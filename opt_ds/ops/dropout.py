"""Dropout of packed rows."""

import torch
import torch.nn.functional as F

from opt_ds.ops import backend
from opt_ds.ops.sequences import Sequences


def dropout(x_te: torch.Tensor, probability: float, rows: Sequences | None, site: int = 0) -> torch.Tensor:
    """Elements kept with 1 − probability and scaled by its inverse (training only: probability 0 gives x_te itself); [t, e].

    `rows`: the sequences that the rows belong to. `site`: which dropout of the model this is; each has its own bits.
    """
    if probability == 0.0:
        return x_te
    library = backend.library("dropout")
    if library is None:
        return F.dropout(x_te, probability, training=True)
    assert rows is not None, "dropout of a compiled backend is keyed by the rows' sequences"
    return getattr(torch.ops, library).dropout(x_te, rows.row_keys, probability, backend.dropout_key(), site)
