"""Dropout + residual + LayerNorm in one operator, and LayerNorm alone.

Shapes: rows of any leading shape [..., E]; weight and bias [E].
"""

import torch
import torch.nn.functional as F


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension (Ba et al. 2016), in x's dtype with fp32 statistics."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """total = residual + dropout(x); gives (LayerNorm(total), total): post-norm uses the first, pre-norm both."""
    if dropout > 0.0:
        x = F.dropout(x, dropout, training=True)
    total = residual + x
    return layer_norm(total, weight, bias, eps), total
