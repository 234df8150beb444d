"""A linear layer and the cross-entropy of its scores in one operator.

The scores of all rows are never in memory at once.

Shape letters: m rows, e width, v classes (tens of thousands).
"""

from typing import Any

import torch

_CHUNK_BYTES = 64 * 2**20  # size of one chunk of fp32 scores


def linear_cross_entropy(
    hidden_me: torch.Tensor, weight_ve: torch.Tensor, bias_v: torch.Tensor, targets_m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute −Σ log softmax(hidden weightᵀ + bias)[target] and the number of targets with the highest score.

    Scores are computed in chunks of rows that take 64 MiB in fp32. They are computed again in the backward pass, unless
    one chunk holds all rows. The softmax is fp32. Its gradient is multiplied by the gradient of the loss before it is
    rounded to the dtype of the inputs. Without rows the weight gets no gradient at all, which autograd treats as 0: a
    tensor of zeros would cost as much as a tensor of gradients.

    Args:
        hidden_me: Hidden states [m, e].
        weight_ve: Weight [v, e].
        bias_v: Bias [v].
        targets_m: Target classes, int64 [m].

    Returns:
        (summed loss, number of correct targets), two fp32 scalars.
    """
    return _LinearCrossEntropy.apply(hidden_me, weight_ve, bias_v, targets_m)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_me: torch.Tensor, weight_ve: torch.Tensor, bias_v: torch.Tensor, targets_m: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.rows = max(1, _CHUNK_BYTES // (4 * len(weight_ve)))
        wide = torch.promote_types(hidden_me.dtype, torch.float32)
        loss, correct = (torch.zeros((), dtype=wide, device=hidden_me.device) for _ in range(2))
        log_norms, scores_cv = [], None
        for hidden_ce, targets_c in zip(hidden_me.split(ctx.rows), targets_m.split(ctx.rows), strict=True):
            scores_cv = torch.addmm(bias_v, hidden_ce, weight_ve.t())
            log_norm_c = scores_cv.to(wide).logsumexp(-1)
            loss += (log_norm_c - scores_cv.gather(1, targets_c[:, None]).squeeze(1)).sum()
            correct += (scores_cv.argmax(-1) == targets_c).sum()
            log_norms.append(log_norm_c)
        kept = scores_cv if len(log_norms) == 1 else None
        ctx.save_for_backward(hidden_me, weight_ve, bias_v, targets_m, torch.cat(log_norms), kept)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden_me, weight_ve, bias_v, targets_m, log_norm_m, kept = ctx.saved_tensors
        wide = log_norm_m.dtype
        grad_hidden_me = torch.empty_like(hidden_me)
        grad_weight_ve, grad_bias_v = None, torch.zeros_like(bias_v, dtype=wide)
        parts = (x.split(ctx.rows) for x in (hidden_me, targets_m, log_norm_m, grad_hidden_me))
        for hidden_ce, targets_c, log_norm_c, grad_hidden_ce in zip(*parts, strict=True):
            if not len(hidden_ce):
                break
            scores_cv = torch.addmm(bias_v, hidden_ce, weight_ve.t()) if kept is None else kept
            grad_cv = (scores_cv.to(wide) - log_norm_c[:, None]).exp_()
            grad_cv.scatter_add_(1, targets_c[:, None], torch.full_like(log_norm_c, -1.0)[:, None])
            grad_bias_v += grad_cv.mul_(gradients[0]).sum(0)
            grad_cv = grad_cv.to(hidden_me.dtype)
            torch.mm(grad_cv, weight_ve, out=grad_hidden_ce)
            grad_weight = torch.mm(grad_cv.t(), hidden_ce)
            if grad_weight_ve is None:
                grad_weight_ve = grad_weight if kept is not None else grad_weight.to(wide)  # chunks are summed in fp32
            else:
                grad_weight_ve += grad_weight
        if grad_weight_ve is not None:
            grad_weight_ve = grad_weight_ve.to(weight_ve.dtype)
        return grad_hidden_me, grad_weight_ve, grad_bias_v.to(bias_v.dtype), None
