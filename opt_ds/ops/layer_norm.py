"""Dropout + residual + LayerNorm in one operator, and LayerNorm alone.

Shapes: rows have any leading shape [..., E]; weight and bias are [E].
"""

import torch
import torch.nn.functional as F

from opt_ds.ops import backend
from opt_ds.ops.dropout import generator_dropout
from opt_ds.ops.sequences import Sequences


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Apply LayerNorm over the last dimension (Ba et al. 2016).

    Args:
        x: Input [..., E].
        weight: Scale [E].
        bias: Shift [E].
        eps: Added to the variance.

    Returns:
        [..., E] in the dtype of x. Mean and variance are computed in fp32.
    """
    library = backend.library("layer_norm")
    if library is not None:
        return getattr(torch.ops, library).layer_norm(x, None, None, weight, bias, eps, None, 0.0, 0, 0)[0]
    if backend.chosen("layer_norm") == "apex":
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        return fused_layer_norm_affine(x, weight, bias, weight.shape, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout: float = 0.0,
    rows: Sequences | None = None,
    layer_id: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute total = residual + dropout(x) and its LayerNorm.

    Args:
        x: Output of a sublayer [..., E].
        residual: Residual stream [..., E].
        weight: Scale of the norm [E].
        bias: Shift of the norm [E].
        eps: Added to the variance.
        dropout: Dropout probability, applied to x. PyTorch's backend uses its generator.
        rows: The sequences that the rows of x belong to. A compiled backend keys its dropout by them.
        layer_id: Dropout layer id, also part of that key.

    Returns:
        (LayerNorm(total), total). Post-norm uses the first, pre-norm uses both.
    """
    library = backend.library("layer_norm")
    if library is not None:
        assert rows is not None or dropout == 0.0, "dropout of a compiled backend is keyed by the rows' sequences"
        row_keys = rows.row_keys if dropout > 0.0 and rows is not None else None
        key = backend.dropout_key() if dropout > 0.0 else 0
        operator = getattr(torch.ops, library).layer_norm
        normed, total, _, _ = operator(x, None, residual, weight, bias, eps, row_keys, dropout, key, layer_id)
        return normed, total
    if dropout > 0.0:
        x = generator_dropout(x, dropout)
    total = residual + x
    return layer_norm(total, weight, bias, eps), total
