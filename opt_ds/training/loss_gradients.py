"""Norm of each loss's own gradient in the shared encoder: which losses decide where a step goes.

The gradient of a step is the sum of the losses' gradients, and clipping scales the sum. A loss whose gradient is small
beside the others' therefore trains the encoder slowly. The losses' weights, `tasks.reduction` and
`tasks.sampling_weights` change the ratio.
"""

from collections.abc import Iterator

import numpy as np
import torch
from deepspeed import DeepSpeedEngine

from opt_ds.config import Config
from opt_ds.data.batch import PackedBatch
from opt_ds.data.loader import MicroBatchLoader
from opt_ds.data.step_plan import StepPlan
from opt_ds.ops import backend
from opt_ds.tasks.global_loss import GlobalLoss, global_losses
from opt_ds.training import deepspeed_internals
from opt_ds.training.distributed import ProcessGroup


class LossGradients:
    """Measures the losses' gradients over the global batch of a step, at the weights before the step.

    Each task's samples pass the model alone, so one measurement takes about as long as a step. Autograd returns the
    gradients; those that the engine accumulates are not touched. The sum of the gradients is the step's own gradient,
    except for PyTorch's dropout, whose bits depend on the micro-batch. At ZeRO stage 3 a forward pass is a collective
    call, which the ranks do not make equally often here.
    """

    def __init__(self, config: Config, engine: DeepSpeedEngine, group: ProcessGroup, loader: MicroBatchLoader) -> None:
        self._config, self._engine, self._group, self._loader = config, engine, group, loader

    def is_due(self, step: int) -> bool:
        """Return whether the gradients of step `step` (0-based) are measured."""
        every = self._config.train.log_gradients_every
        return every > 0 and (step + 1) % every == 0

    def measure(self, step_plan: StepPlan) -> dict[str, float]:
        """Return loss -> norm of its weighted gradient in the encoder, over all ranks."""
        norms: dict[str, float] = {}
        task = step_plan.samples.task
        for number in np.unique(task[task >= 0]).tolist():
            of_task = task == number
            losses = self._loader.plan.losses_of(step_plan.samples, np.flatnonzero(of_task))
            encoder = self._engine.module.encoder
            sums = {loss: [torch.zeros_like(p, dtype=torch.float32) for p in encoder.parameters()] for loss in losses}
            compared = self._first_pass(step_plan, number, of_task)
            for k, indices in self._micro_batches(step_plan, of_task):
                self._add(step_plan, k, indices, sums, compared)
            norms |= {loss: self._norm(parts) for loss, parts in sums.items()}
        return norms

    def _micro_batches(self, step_plan: StepPlan, of_task: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number and the samples of a task of each of this rank's micro-batches that has any.

        Those of the first pass have samples of no other task, or none at all.
        """
        for k, micro_batch in enumerate(step_plan.micro_batches[self._group.ranks.rank]):
            indices = micro_batch.indices[of_task[micro_batch.indices]]
            if len(indices) or (k < step_plan.first_pass and not len(micro_batch.indices)):
                yield k, indices

    @torch.no_grad()
    def _first_pass(self, step_plan: StepPlan, number: int, of_task: np.ndarray) -> dict[str, GlobalLoss]:
        """Return the task's loss over the step by name, if it takes two passes, otherwise nothing."""
        names = list(self._loader.plan.tasks)
        losses = global_losses(self._loader.plan, self._group.device)
        compared = {name: loss for name, loss in losses.items() if name == names[number]}
        for name, over_step in compared.items():
            over_step.begin(step_plan.samples)
            for k, indices in self._micro_batches(step_plan, of_task):
                batch = self._batch(step_plan, k, indices)
                over_step.add(batch.parts[name], self._engine.module(batch))
            over_step.combine(self._group.sum, with_gradient=True)
        return compared

    def _batch(self, step_plan: StepPlan, k: int, indices: np.ndarray) -> PackedBatch:
        backend.seed_dropout(self._config.seed, step_plan.step, self._group.ranks.rank, k)
        return self._loader.batch_of(step_plan, indices).to(self._group.device)

    def _add(
        self,
        step_plan: StepPlan,
        k: int,
        indices: np.ndarray,
        sums: dict[str, list[torch.Tensor]],
        compared: dict[str, GlobalLoss],
    ) -> None:
        """Add the gradients of some samples of a micro-batch to the sums."""
        batch = self._batch(step_plan, k, indices)
        for name, over_step in compared.items():
            batch.parts[name] = over_step.cached(batch.parts[name])
        terms = self._engine.module(batch)
        parameters = list(self._engine.module.encoder.parameters())
        scale = deepspeed_internals.loss_scale(self._engine)
        for loss, parts in sums.items():
            factor = self._config.tasks.loss_weight(loss) / step_plan.divisors[loss]
            found = torch.autograd.grad(terms[loss].sum * (factor * scale), parameters, retain_graph=True, allow_unused=True)
            for total, gradient in zip(parts, found, strict=True):
                if gradient is not None:
                    total.add_(gradient.float(), alpha=1 / scale)

    def _norm(self, parts: list[torch.Tensor]) -> float:
        """Return the norm of the sum over the ranks."""
        gradient = torch.cat([part.flatten() for part in parts])
        if self._group.ranks.world_size > 1:
            torch.distributed.all_reduce(gradient)
        return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
