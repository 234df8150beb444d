"""One optimiser step over the global batch: forward and backward of the micro-batches, check of the loss, one update.

Losses that compare samples across micro-batches take a first pass before it (see `opt_ds.tasks.global_loss`).
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from opt_ds.config import Config
from opt_ds.data.batch import PackedBatch
from opt_ds.data.loader import MicroBatchLoader
from opt_ds.data.step_plan import StepPlan
from opt_ds.ops import backend
from opt_ds.tasks.base import total_loss
from opt_ds.tasks.global_loss import GlobalLoss, global_losses
from opt_ds.training import deepspeed_internals, guard
from opt_ds.training.distributed import ProcessGroup
from opt_ds.training.guard import Guard
from opt_ds.training.host_memory import MemoryKeeper
from opt_ds.training.metrics import TermSums

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """Result of one step."""

    sums: TermSums | None  # This rank's terms. None: the loss was not finite, or it was a spike that is skipped.
    gradient_norm: float  # global norm before clipping; infinite if it overflowed


class SkipBudgetError(Exception):
    """More steps were not finite than the guard may skip. The weights are those before the step."""


class Stepper:
    """Takes the steps of one rank.

    All ranks make the same decisions, because they check the same global loss and norm.
    """

    def __init__(
        self,
        config: Config,
        engine: DeepSpeedEngine,
        group: ProcessGroup,
        loader: MicroBatchLoader,
        watch: Guard,
        memory: MemoryKeeper,
        output: Path,
    ) -> None:
        self.config, self.engine, self.group, self.loader = config, engine, group, loader
        self.guard, self.memory, self.output = watch, memory, output

    def take(self, step_plan: StepPlan, micro_batches: Iterator[PackedBatch]) -> StepResult:
        """Accumulate the step's gradients and update the weights, or skip the step within the guard's budget."""
        self._set_lr(step_plan.step)
        world_size = self.group.ranks.world_size
        last = len(step_plan.micro_batches[self.group.ranks.rank]) - 1
        compared = self._first_pass(step_plan, micro_batches)
        sums, vectors = TermSums(), []
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.group.device)
        for k, batch in enumerate(micro_batches):
            backend.seed_dropout(self.config.seed, step_plan.step, self.group.ranks.rank, k)
            self.engine.set_gradient_accumulation_boundary(k == last)
            for task, over_step in compared.items() if k < step_plan.first_pass else ():
                batch.parts[task] = over_step.cached(batch.parts[task])
            terms = self.engine(batch)
            loss = total_loss(terms, step_plan.divisors, self.config.tasks, world_size)
            self.engine.backward(loss, scale_wrt_gas=False)
            loss_sum += loss.detach()
            vectors.append(sums.add(terms))
            self.memory.after_micro_batch(k)
        sums.add_counts(step_plan.counts, step_plan.divisors)

        global_loss = float(self.group.sum(loss_sum)) / world_size
        verdict, z = self.guard.judge_loss(global_loss)
        if verdict == "spike":
            _LOG.warning(f"step {step_plan.step}: loss {global_loss:.4g} is a spike, {z:.1f} deviations above its mean")
        if verdict == "not finite" or (verdict == "spike" and self.config.guard.skip_spikes):
            deepspeed_internals.discard_gradients(self.engine)
            self._account_for_skip(step_plan, [sums.non_finite(vector) for vector in vectors], verdict)
            return StepResult(None, math.nan)
        return self._update(step_plan, sums)

    @torch.no_grad()
    def _first_pass(self, step_plan: StepPlan, micro_batches: Iterator[PackedBatch]) -> dict[str, GlobalLoss]:
        """Run the micro-batches of the first pass. Return task -> its loss over the whole step, with its gradients.

        The second pass runs the same micro-batches with the same seeds, so dropout repeats itself.
        """
        if not step_plan.first_pass:
            return {}
        compared = global_losses(self.loader.plan, self.group.device)
        for over_step in compared.values():
            over_step.begin(step_plan.samples)
        for k, batch in zip(range(step_plan.first_pass), micro_batches):  # noqa: B905 - the second pass follows
            backend.seed_dropout(self.config.seed, step_plan.step, self.group.ranks.rank, k)
            terms = self.engine(batch)
            for task, over_step in compared.items():
                over_step.add(batch.parts[task], terms)
        for over_step in compared.values():
            over_step.combine(self.group.sum, with_gradient=True)
        return compared

    def _update(self, step_plan: StepPlan, sums: TermSums) -> StepResult:
        """Clip the gradient and update the weights.

        Skip the update if the gradient is not finite; in fp16 its loss scale is then reduced.
        """
        scale, least = deepspeed_internals.loss_scale(self.engine), deepspeed_internals.least_loss_scale(self.engine)
        if self.config.zero.stage == 0:  # there DeepSpeed neither reports a norm nor checks it
            weights = [p for p in self.engine.module.parameters() if p.grad is not None]
            total_norm = nn.utils.get_total_norm([p.grad for p in weights])
            norm = float(total_norm)
            if math.isfinite(norm):
                if self.config.optimizer.clip_norm:
                    nn.utils.clip_grads_with_norm_(weights, self.config.optimizer.clip_norm, total_norm)
                taken = deepspeed_internals.take_step(self.engine)
            else:
                deepspeed_internals.discard_gradients(self.engine)
                taken = False
        else:
            taken = deepspeed_internals.take_step(self.engine)
            norm = float(self.engine.get_global_grad_norm())
        if taken:
            verdict, z = self.guard.judge_gradient_norm(norm)
            if verdict == "spike":
                _LOG.warning(
                    f"step {step_plan.step}: gradient norm {norm:.4g} is a spike, {z:.1f} deviations above its mean"
                )
        elif scale <= least:  # without a loss scale both are 1
            self._account_for_skip(step_plan, [], "not finite")
        return StepResult(sums, norm)

    def _account_for_skip(self, step_plan: StepPlan, bad_by_micro_batch: list[list[str]], verdict: str) -> None:
        """Count a skipped step, and dump and log its cause.

        Raise SkipBudgetError if the budget allows no further one.
        """
        allowed = self.guard.count_skip(step_plan.step)
        named = [
            item for item in self.group.gather(self._dump_first(step_plan, bad_by_micro_batch)) if item is not None
        ]
        if named:
            what, path = named[0]
        else:
            every = self.group.gather(self.loader.sample_names(step_plan))
            path = guard.dump_sample_names(self.output, step_plan.step, every, write=self.group.ranks.is_main)
            what = "the loss" if verdict == "spike" else "the gradient"
        scale = deepspeed_internals.loss_scale(self.engine)
        at_scale = f" at loss scale {scale:g}" if scale != 1 else ""
        options, number = self.config.guard, len(self.guard.state.skipped)
        text = f"step {step_plan.step}: {what} is {'a spike' if verdict == 'spike' else 'not finite'}{at_scale}, see {path}"
        if not allowed:
            raise SkipBudgetError(
                f"{text}; guard.skip_budget is {options.skip_budget} step{'s' * (options.skip_budget != 1)} in "
                f"{options.skip_window}"
            )
        _LOG.warning(f"{text}; step skipped ({number} of at most {options.skip_budget} in {options.skip_window})")

    def _dump_first(self, step_plan: StepPlan, bad_by_micro_batch: list[list[str]]) -> tuple[str, Path] | None:
        """Dump this rank's first micro-batch whose losses are not finite.

        Return a description with the samples, and the file.
        """
        number = next((k for k, bad in enumerate(bad_by_micro_batch) if bad), None)
        if number is None:
            return None
        rank = self.group.ranks.rank
        indices = step_plan.micro_batches[rank][number].indices
        batch = self.loader.batch_of(step_plan, indices)
        names, losses = self._to_blame(step_plan, indices) or (list(batch.sample_names), bad_by_micro_batch[number])
        path = guard.dump_micro_batch(self.output, step_plan.step, rank, number, batch, losses, names)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"the loss {', '.join(losses)} of {', '.join(names[:8])}{more}", path

    @torch.no_grad()
    def _to_blame(self, step_plan: StepPlan, indices: np.ndarray) -> tuple[list[str], list[str]] | None:
        """Return the samples whose losses are not finite when computed alone, and these losses.

        A NaN spreads over its micro-batch, so the losses of the micro-batch do not identify the sample. Return None if
        the losses of single samples do not identify it either.
        """
        if self.config.zero.stage == 3:  # a forward pass at stage 3 is a collective call
            return None
        names, losses = [], []
        self.engine.module.eval()
        for index in indices:
            batch, sums = self.loader.batch_of(step_plan, [index]).to(self.group.device), TermSums()
            if bad := sums.non_finite(sums.add(self.engine.module(batch))):
                names += batch.sample_names
                losses += [loss for loss in bad if loss not in losses]
        self.engine.module.train()
        return (names, losses) if 0 < len(names) < len(indices) or len(indices) == 1 else None

    def _set_lr(self, step: int) -> None:
        lr = self.config.optimizer.lr * self.config.schedule.lr_factor(step)
        for parameters in deepspeed_internals.base_optimizer(self.engine).param_groups:
            parameters["lr"] = lr
