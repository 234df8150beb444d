"""Losses that compare samples across the micro-batches and ranks of a step, computed exactly in two passes.

A loss such as the contrast of `tasks.alignment` needs the outputs of all samples of a step at once, while a micro-batch's
activations fit into memory only one at a time. The step therefore runs the micro-batches of such a task twice (gradient
caching: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"):

1. **First pass, without a graph.** Each micro-batch runs through the engine. The head returns its outputs, one vector per
   sequence (`LossTerm.shared`), and no activation is kept.
2. **Between the passes.** The outputs of all micro-batches of all ranks are put into one table, in the order of the step
   plan (`GlobalLoss.combine`). Every rank computes the loss over the whole table in fp32, and its gradient with respect to
   every output and to the parameters that the loss itself uses (a temperature).
3. **Second pass, with a graph.** Each micro-batch runs again. Its term is Σ output · cached gradient, whose gradient with
   respect to the weights is that of the loss over the whole step, by the chain rule. The term's value is the micro-batch's
   part of that loss. DeepSpeed's `backward` per micro-batch, its loss scale and ZeRO are used as for any other loss.

The result is that of one batch, for any number of ranks and micro-batches, provided that a sequence has the same output in
both passes. It has: the passes run the same micro-batches with the same seed of dropout (`backend.seed_dropout`), and our
dropout depends on nothing but (seed, step, layer, sample, position) anyway.

The step plan puts the sequences of such tasks into micro-batches of their own, the first ones of a step
(`StepPlan.first_pass`), so that the first pass encodes nothing else. The loader reads and packs them twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch

from opt_ds.data.step_plan import Plan
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import BatchPart
from opt_ds.tasks.base import LossTerm, Task

#: Returns the sum of a tensor over all ranks, as `ProcessGroup.sum` does.
SumOverRanks = Callable[[torch.Tensor], torch.Tensor]


class GlobalLoss(ABC):
    """One task's losses over all samples of a step, or of a validation pass. All ranks make the same calls."""

    @abstractmethod
    def begin(self, samples: StepSamples) -> None:
        """Expect the outputs of these samples. A validation pass has several chunks of them."""

    @abstractmethod
    def add(self, part: BatchPart, terms: dict[str, LossTerm]) -> None:
        """Keep the outputs of a micro-batch of the samples of the last `begin`.

        Args:
            part: The task's part of the micro-batch.
            terms: What the model returned for it.
        """

    @abstractmethod
    def combine(self, sum_over_ranks: SumOverRanks, with_gradient: bool) -> dict[str, LossTerm]:
        """Compute the losses over all samples of all ranks.

        Args:
            sum_over_ranks: Sums a tensor over the ranks. It is called the same number of times on every rank.
            with_gradient: Whether gradients are computed, for `cached`.

        Returns:
            The terms over all samples, equal on every rank.
        """

    @abstractmethod
    def cached(self, part: BatchPart) -> BatchPart:
        """Return the task's part of a micro-batch with the gradients of its outputs, for the second pass."""


def global_losses(plan: Plan, device: torch.device) -> dict[str, GlobalLoss]:
    """Return task -> a new loss over a step, for the plan's tasks that take two passes."""
    return {
        name: cast(Task, task).global_loss(device)
        for name, task in plan.tasks.items()
        if task.takes_two_passes and task.is_configured
    }
