"""What a task gives back, and how a step's one loss is made of it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from opt_ds.config import TasksConfig
from opt_ds.ops.linear_cross_entropy import linear_cross_entropy


class LossTerm(NamedTuple):
    """A micro-batch's part of one loss: the fp32 sum over its terms, how many they are, and metrics over the same terms.

    A micro-batch without work gives an empty sum: 0, with a gradient of 0 for every parameter of the head.
    """

    sum: torch.Tensor
    count: float  # type: ignore[assignment]  # the field hides tuple.count
    metrics: dict[str, torch.Tensor]


def classification_term(scores: torch.Tensor, targets: torch.Tensor) -> LossTerm:
    """Summed cross-entropy of fp32 scores [m, classes] against targets [m]; counts the correct ones."""
    loss = F.cross_entropy(scores.float(), targets, reduction="sum")
    correct = (scores.detach().argmax(-1) == targets).sum().float() if len(targets) else torch.zeros((), device=scores.device)
    return LossTerm(loss, float(len(targets)), {"correct": correct})


def vocabulary_term(
    hidden_me: torch.Tensor, weight_ve: torch.Tensor, bias_v: torch.Tensor, targets: torch.Tensor
) -> LossTerm:
    """As `classification_term` of hidden · weightᵀ + bias, over so many classes that the scores are not kept."""
    loss, correct = linear_cross_entropy(hidden_me, weight_ve, bias_v, targets)
    return LossTerm(loss, float(len(targets)), {"correct": correct})


def total_loss(
    terms: dict[str, LossTerm], counts: dict[str, float], tasks: TasksConfig, world_size: int
) -> torch.Tensor:
    """Σ weight · sum · world_size / count, with `counts` over the whole global batch.

    The factor world_size undoes the mean over ranks that the gradient reduction takes; so the accumulated gradient is that of
    Σ weight · (mean over the global batch), whatever the ranks and micro-batches. A loss that is off or has count 0 counts 0.
    """
    total = torch.zeros((), device=next(iter(terms.values())).sum.device)
    for loss, term in terms.items():
        count = counts.get(loss, 0.0)
        scale = tasks.loss_weight(loss) * world_size / count if count else 0.0
        total = total + term.sum * scale
    return total
