"""Contrast between two views of each of n samples: every sample is a negative of every other one.

`infonce`: softmax cross-entropy over the candidates, in both directions (van den Oord et al. 2018; Radford et al. 2021).
`sigmoid`: binary cross-entropy of every pair with a learned bias, summed per sample (Zhai et al. 2023).

The scores [n, n] are computed in blocks of rows, so that memory does not grow with the square of n.

Legend: v views of all samples, d width of the embeddings, n samples of a pair of views, b samples of a block.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

#: Upper limit of the logarithm of the scale, as in CLIP.
LOG_SCALE_LIMIT = math.log(100)
_SCORES_AT_ONCE = 1 << 22  # elements of a block, 16 MiB in fp32


class Pair(NamedTuple):
    """The samples that have both views of a pair."""

    first: torch.Tensor  # int64 [n], rows of the first view in the table
    second: torch.Tensor  # int64 [n], rows of the second view
    weight: torch.Tensor  # float32 [n], weight of each sample's loss


class Temperature(NamedTuple):
    """The parameters of the loss itself, float32 [1] each. `bias` is used by the sigmoid loss only."""

    log_scale: torch.Tensor
    bias: torch.Tensor


class Contrast(NamedTuple):
    """The loss over all pairs, and its gradients (0 without `with_gradient`)."""

    loss: torch.Tensor  # float32 [], Σ weight · loss
    correct: torch.Tensor  # float32 [], Σ weight · whether the own other view has the best score, over both directions
    chance: torch.Tensor  # float32 [], Σ weight / candidates
    of_table: torch.Tensor  # float32 [v, d]
    of_temperature: Temperature


def contrast(
    table_vd: torch.Tensor,
    keys_vk: torch.Tensor,
    pairs: Sequence[Pair],
    temperature: Temperature,
    loss: str,
    with_gradient: bool = True,
) -> Contrast:
    """Return the contrastive loss of all pairs of views.

    Args:
        table_vd: Normalised embeddings, float32 [v, d].
        keys_vk: int64 [v, k], identifiers of the content of each view's sample (0: none). Samples that share one are not
            negatives of each other.
        pairs: Pairs of views.
        temperature: Logarithm of the scale of the scores, and the bias.
        loss: "infonce" or "sigmoid".
        with_gradient: Whether gradients are computed.

    Returns:
        The loss, its metrics and its gradients.
    """
    gradient = torch.zeros_like(table_vd)
    total = torch.zeros(3, dtype=torch.float64, device=table_vd.device)
    with torch.inference_mode(False), torch.set_grad_enabled(with_gradient):
        leaves = Temperature(*(value.detach().clone().requires_grad_(with_gradient) for value in temperature))
        for pair in pairs:
            first, second = (table_vd[rows].detach().requires_grad_(with_gradient) for rows in (pair.first, pair.second))
            keys = keys_vk[pair.first]
            for query, target in ((first, second), (second, first)):
                total += _one_direction(query, target, keys, pair.weight / 2, leaves, loss)
            if with_gradient and len(pair.first):
                gradient.index_add_(0, pair.first, _gradient_of(first))
                gradient.index_add_(0, pair.second, _gradient_of(second))
    of_temperature = Temperature(*(_gradient_of(leaf) for leaf in leaves))
    if float(temperature.log_scale) >= LOG_SCALE_LIMIT:  # it may only become smaller, which takes a positive gradient
        of_temperature = of_temperature._replace(log_scale=of_temperature.log_scale.clamp_min(0))
    value, correct, chance = total.float().unbind()
    return Contrast(value, correct, chance, gradient, of_temperature)


def _one_direction(
    query_nd: torch.Tensor,
    target_nd: torch.Tensor,
    keys_nk: torch.Tensor,
    weight_n: torch.Tensor,
    temperature: Temperature,
    loss: str,
) -> torch.Tensor:
    """Return float64 [3]: Σ weight · (loss, whether correct, chance) of ranking the targets for each query.

    Where gradients are enabled, they are added to `.grad` of the embeddings and of the temperature.
    """
    total = torch.zeros(3, dtype=torch.float64, device=query_nd.device)
    count = len(query_nd)
    rows = max(1, _SCORES_AT_ONCE // max(1, count))
    for start in range(0, count, rows):
        own_b = torch.arange(start, min(start + rows, count), device=query_nd.device)
        weight_b = weight_n[own_b]
        excluded_bn = _excluded(keys_nk, own_b)
        scores_bn = query_nd[own_b] @ target_nd.T * _limited(temperature.log_scale).exp()
        if loss == "sigmoid":
            losses_b = _sigmoid_losses(scores_bn + temperature.bias, own_b, excluded_bn)
        else:
            losses_b = F.cross_entropy(scores_bn.masked_fill(excluded_bn, float("-inf")), own_b, reduction="none")
        loss_sum = (losses_b * weight_b).sum()
        if loss_sum.requires_grad:
            loss_sum.backward()
        best_b = scores_bn.detach().masked_fill(excluded_bn, float("-inf")).argmax(1)
        chance_b = 1.0 / (count - excluded_bn.sum(1))
        sums = (loss_sum.detach(), ((best_b == own_b) * weight_b).sum(), (chance_b * weight_b).sum())
        total += torch.stack([value.double() for value in sums])
    return total


def _sigmoid_losses(logits_bn: torch.Tensor, own_b: torch.Tensor, excluded_bn: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of each query's pairs, summed over the targets that are not excluded, [b]."""
    sign_bn = torch.full_like(logits_bn, -1.0).scatter(1, own_b[:, None], 1.0)
    return F.softplus(-sign_bn * logits_bn).masked_fill(excluded_bn, 0.0).sum(1)


def _excluded(keys_nk: torch.Tensor, own_b: torch.Tensor) -> torch.Tensor:
    """Return which samples are no negatives of the block's samples because they share content, bool [b, n]."""
    excluded_bn = torch.zeros(len(own_b), len(keys_nk), dtype=torch.bool, device=keys_nk.device)
    for keys_n in keys_nk.unbind(1):
        keys_b = keys_n[own_b, None]
        excluded_bn |= (keys_b == keys_n) & (keys_b != 0)
    return excluded_bn.scatter_(1, own_b[:, None], False)


def _limited(log_scale: torch.Tensor) -> torch.Tensor:
    """Return the value, at most `LOG_SCALE_LIMIT`. Its gradient is passed on also beyond the limit."""
    return log_scale + (log_scale.clamp_max(LOG_SCALE_LIMIT) - log_scale).detach()


def _gradient_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
