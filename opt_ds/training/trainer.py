"""Training of the model: one optimiser step after the other, and what happens between steps.

An optimiser step is a function of (weights, moments, loss scale, seed, step) alone; see `opt_ds.data.step_plan`.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from opt_ds.config import Config
from opt_ds.data.finetune_plan import make_plan
from opt_ds.data.loader import MicroBatchLoader
from opt_ds.data.step_plan import StepPlan
from opt_ds.errors import UserError
from opt_ds.model.initial import initial_model
from opt_ds.ops import backend
from opt_ds.store.files import write_json
from opt_ds.store.reader import FeatureStore
from opt_ds.training import checkpoint, deepspeed_internals, init_from, optimizer_state, run_folder
from opt_ds.training.callbacks import Callbacks
from opt_ds.training.checkpoint import TrainState
from opt_ds.training.checkpoint_writer import CheckpointWriter, Contents, check_space
from opt_ds.training.deepspeed_config import Hardware, Precision, deepspeed_settings
from opt_ds.training.distributed import ProcessGroup
from opt_ds.training.guard import Guard, TrainingError, differing_parameter
from opt_ds.training.hardware import peak_flops
from opt_ds.training.host_memory import (
    MemoryKeeper,
    keep_few_primitives,
    keep_freed_memory,
    peak_memory_gib,
    spare_loaded_objects,
)
from opt_ds.training.loop import Intervals, TrainingLoop
from opt_ds.training.loss_gradients import LossGradients
from opt_ds.training.metrics import VALIDATION_FILE, settings_table, validation_table
from opt_ds.training.node_folder import share_plans
from opt_ds.training.profile import StepProfiler
from opt_ds.training.signals import REQUEUE_EXIT_CODE, StopRequest
from opt_ds.training.step import SkipBudgetError, Stepper
from opt_ds.training.throughput import ThroughputMeter
from opt_ds.training.time_limit import TimeLimit
from opt_ds.training.validation import validation_losses

_LOG = logging.getLogger(__name__)
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer(TrainingLoop):
    """Trains one model on the ranks of `group`, from the checkpoint `resume_from` or from the beginning."""

    group: ProcessGroup
    state: TrainState

    def __init__(
        self,
        config: Config,
        stores: list[FeatureStore],
        output: Path,
        group: ProcessGroup,
        hardware: Hardware,
        precision: Precision,
        resume_from: Path | None,
        stop: StopRequest,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.config, self.stores, self.output, self.group, self.precision = config, stores, output, group, precision
        self.ranks, self.callbacks = group.ranks, callbacks or Callbacks()
        self.freed_memory = keep_freed_memory(group.device.type)
        self.primitives_kept = keep_few_primitives(group.device.type, precision)
        saved = checkpoint.read_state(resume_from) if resume_from else {}
        self.plan = make_plan(config, stores, saved.get("plan_version"))
        if not self.plan.has_validation(config.train.validate_samples):
            raise UserError(
                f'{stores[0].path}: no sample of split "{config.data.valid_split}" has what the tasks need: assign samples '
                "that have it to this split (opt-ds split), or name another one with data.valid_split"
            )
        shared, self._node_folder = share_plans(self.plan, group)
        self.loader = MicroBatchLoader(self.plan, self.ranks.rank, self.ranks.world_size, group.device, shared)
        backend.choose(config.ops.backend, group.device)

        state = checkpoint.train_state(saved) if saved else TrainState()
        first_step = self.plan.step(state.step, self.ranks.world_size)
        settings = deepspeed_settings(config, precision, len(first_step.micro_batches[0]))
        # Parameters taken from the --init-from run, in the first launch only.
        self.carried: init_from.Carried | None = None
        self.adam_steps_before = config.init.adam_steps if config.init else 0
        self.engine = self._build_engine(settings, resume_from)
        group.bound_all_collectives()
        self.profiler = StepProfiler(config.profile, output, self.ranks.rank)
        self.meter = ThroughputMeter(config, self.loader, peak_flops(hardware, precision))
        about = {
            "plan_version": self.plan.version,
            "config": config.model_dump(mode="json"),
            "stores": [store.fingerprint for store in stores],
            "versions": run_folder.versions(),
            "precision": precision,
            "zero_stage": config.zero.stage,
            "world_size": self.ranks.world_size,
        }
        super().__init__(
            output, group, state, Intervals(config.max_steps, config.train.log_every, config.checkpoint.every_steps), stop,
            TimeLimit(config.train), CheckpointWriter(output, group, config.checkpoint.keep, about), bool(resume_from),
        )  # fmt: skip
        self.stepper = Stepper(
            config, self.engine, group, self.loader, Guard(config.guard, state.guard), MemoryKeeper(stores), output
        )
        self.loss_gradients = LossGradients(config, self.engine, group, self.loader)
        self._describe(hardware, settings, first_step, resume_from)

    # ---- training loop

    def train(self) -> int:
        """Train until `max_steps` or early stopping.

        Return the exit code of the process: 0, or 75 after a request to stop.

        Raise TrainingError if training cannot continue, and CheckpointError if a checkpoint cannot be written.
        """
        try:
            stopped = self.run()
            if self.state.stopped_early:
                _LOG.info(
                    f"early stopping at step {self.state.step}: no improvement since step {self.state.best_step}"
                )
            if stopped:
                _LOG.info(
                    f"{stopped}: saved after step {self.state.step}; run the same command again to resume"
                )
            else:
                _LOG.info(f"finished after step {self.state.step}: {self.output}")
            self.group.barrier()  # because a launcher ends all ranks when the first one exits
            return REQUEUE_EXIT_CODE if stopped else 0
        except SkipBudgetError as error:
            folder = self.save()
            self.writer.wait()
            raise TrainingError(
                f"{error}; the weights before it are in {folder}: check these samples, or lower optimizer.lr and start "
                "with another --output, or allow more with guard.skip_budget"
            ) from None
        finally:
            self.close()

    def take_steps(self) -> Iterator[None]:
        """Take the remaining steps. Yield after each one."""
        self.engine.train()
        self.meter.restart()
        for step_plan, micro_batches in self.loader.steps(self.state.step, self.config.max_steps):
            if self.loss_gradients.is_due(self.state.step):
                self._log_gradients(step_plan)
            self.meter.add(step_plan, self.stepper.take(step_plan, micro_batches))
            self.profiler.step_done(self.state.step + 1)
            yield

    def _log_gradients(self, step_plan: StepPlan) -> None:
        with self.meter.paused():
            norms = self.loss_gradients.measure(step_plan)
            self.report.scalars(self.state.step + 1, {f"gradients/{loss}": norm for loss, norm in norms.items()}, "gradients")

    def paused(self) -> AbstractContextManager[None]:
        """Return a context for work that does not count as training time."""
        return self.meter.paused()

    def after_step(self) -> None:
        """Compare the ranks, validate and call the callbacks, if they are due."""
        self._compare_ranks()
        if self.is_due(self.config.train.validate_every):
            self.validate()
        self.callbacks.after_step(self)

    def ends_early(self) -> bool:
        """Return whether early stopping has ended the run."""
        return self.state.stopped_early

    def _compare_ranks(self) -> None:
        every = self.config.guard.compare_ranks_every
        if not every or self.state.step % every or self.ranks.world_size == 1 or self.config.zero.stage == 3:
            return
        name = differing_parameter(self.engine.module, self.group)
        if name:
            raise TrainingError(
                f"after step {self.state.step} the ranks' weights differ ({name}): memory or network is faulty; start again "
                f"from a checkpoint at least {every} steps back (remove the newer ones)"
            )

    # ---- between steps

    def log(self) -> dict[str, str]:
        """Report losses, rates and times since the last report. Return the status for the progress bar."""
        meter = self.meter
        means = meter.sums.means(self.group.sum(meter.sums.vector()))
        losses = {loss: value for (loss, name), value in means.items() if name == "loss"}
        total = meter.sums.weighted(losses, self.config.tasks)
        lr = self.config.optimizer.lr * self.config.schedule.lr_factor(self.state.step - 1)
        rates = meter.rates()
        self.state.train_seconds += meter.seconds()
        values = {
            **({"train/loss": total} if losses else {}),  # no loss if every step of the interval was skipped
            **{f"train/{loss}/{name}": value for (loss, name), value in means.items()},
            "optimizer/lr": lr,
            "optimizer/gradient_norm": meter.gradient_norm(),
            "optimizer/loss_scale": deepspeed_internals.loss_scale(self.engine),
            "optimizer/skipped_steps": float(
                self.state.step + self.adam_steps_before - optimizer_state.adam_steps(self.engine)
            ),
            "guard/not_finite": float(self.state.guard.num_skipped),
            "guard/spikes": float(self.state.guard.num_spikes),
            "checkpoint/stall_s": self.writer.stall_s,
            "checkpoint/write_s": self.writer.write_s,
            **{f"speed/{name}": value for name, value in rates.items()},
            "memory/peak_gib": peak_memory_gib(self.group.device),
        }
        self.report.scalars(self.state.step, values, "train")
        meter.restart()
        return {"loss": f"{total:.3f}" if losses else "–", "tokens/s": f"{rates['tokens_per_s']:.0f}"}

    def validate(self) -> float:
        """Evaluate every task on every validation sample.

        Log the table, save the best checkpoint and return the weighted loss.
        """
        found = validation_losses(self.engine, self.config, self.loader, self.group.sum)
        step, baselines = self.state.step, self.callbacks.reference_losses(self)
        self._note_validation(found.weighted)
        _LOG.info(validation_table(step, found.losses, baselines, found.accuracies, found.weighted))
        values = {f"valid/{loss}/loss": value for loss, value in found.losses.items()}
        values |= {f"valid/{loss}/accuracy": value for loss, value in found.accuracies.items()}
        self.report.scalars(step, {"valid/loss": found.weighted, **values}, "valid")
        if self.ranks.is_main:
            table = {
                "step": step,
                "weighted_loss": found.weighted,
                "losses": found.losses,
                "accuracies": found.accuracies,
            }
            write_json(self.output / VALIDATION_FILE, {**table, "baselines": baselines})
        self.callbacks.after_validation(self)
        return found.weighted

    def contents(self) -> Contents:
        """Return what a checkpoint of this step holds."""
        self.state.adam_steps = optimizer_state.adam_steps(self.engine)
        self.state.scaler = deepspeed_internals.scaler_state(self.engine)
        return Contents(asdict(self.state), self.engine.module, optimizer_state.gather(self.engine))

    def is_best(self) -> bool:
        """Return whether the validation of this step is the best one so far."""
        return self.state.best_step == self.state.step

    def _note_validation(self, total: float) -> None:
        """Compare a validation with the best one so far.

        Save a new best at once, so that it survives a later failure.
        """
        best = self.state.best_loss
        if math.isfinite(total) and (best is None or not math.isfinite(best) or total < best):
            self.state.best_loss, self.state.best_step, self.state.validations_without_gain = total, self.state.step, 0
            self.save()
        else:
            self.state.validations_without_gain += 1
            patience = self.config.train.early_stopping
            self.state.stopped_early = bool(patience) and self.state.validations_without_gain >= patience

    def close(self) -> None:
        """Close the threads and files of the run. This is called however the run ended."""
        self.loader.close()
        if self._node_folder is not None:
            self._node_folder.close()
        self.profiler.close()
        super().close()

    # ---- construction

    def _build_engine(self, settings: dict[str, Any], resume_from: Path | None) -> deepspeed.DeepSpeedEngine:
        model = initial_model(self.config, self.stores, warm_start=not resume_from)
        if resume_from:
            checkpoint.load_weights(model, resume_from)
        elif self.config.finetune:
            checkpoint.load_start(model, self.config)
        elif self.config.init:
            self.carried = init_from.load_weights(model, self.config.init)
        num_parameters = sum(p.numel() for p in model.parameters())
        self.group.main_does(lambda: check_space(self.output, num_parameters))
        # DeepSpeed copies its fp32 master weights from the half-precision weights. These copies keep the unrounded
        # values.
        exact = (
            {n: p.detach().clone() for n, p in model.named_parameters()}
            if self.precision in _HALF and not resume_from
            else {}
        )
        optimizer = self.config.optimizer
        adam = torch.optim.AdamW(parameter_groups(model, optimizer.weight_decay), lr=0.0, betas=optimizer.betas,
                                 eps=optimizer.eps, fused=True)  # fmt: skip
        spare_loaded_objects()
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings, dist_init_required=False)
        deepspeed_internals.use_few_kernels(engine)
        if resume_from:
            checkpoint.load_optimizer(engine, resume_from)
        else:
            optimizer_state.create_moments(engine, self.adam_steps_before)
            if exact:
                optimizer_state.scatter(engine, lambda name, key: exact[name], ("weight",))
            if self.carried and self.carried.init.moments:
                init_from.load_moments(engine, self.carried)
        return engine

    def _describe(
        self, hardware: Hardware, settings: dict[str, Any], first: StepPlan, resume_from: Path | None
    ) -> None:
        """Log and record every choice that was made for this launch."""
        numel = sum(deepspeed_internals.full_numel(p) for p in self.engine.module.parameters())
        launch: dict[str, Any] = {
            "device": hardware.name,
            "ranks": f"{self.ranks.world_size} ({self.ranks.launcher})",
            "threads": torch.get_num_threads(),
            "freed_memory": self.freed_memory,
            "primitives_kept": self.primitives_kept,
            "precision": self.precision,
            "zero_stage": self.config.zero.stage,
            "kernels": ", ".join(f"{operator}: {kernel}" for operator, kernel in backend.describe().items()),
            "kernels_not_used": backend.reasons(),
            "parameters": numel,
            "samples_per_step": self.plan.batch_samples,
            "micro_batches": len(first.micro_batches[0]),
            "tasks_disabled": self.plan.disabled_tasks,
            "resumed_from": resume_from.name if resume_from else None,
            **({"init_from": self.carried.record()} if self.carried else {}),
            "versions": run_folder.versions(),
            "deepspeed": settings,
        }
        if self.ranks.is_main:
            run_folder.record_launch(self.output, self.config, self.stores, launch)
        _LOG.info(
            f"{hardware.name}: {self.ranks.world_size} rank{'s' * (self.ranks.world_size > 1)} of {launch['threads']} "
            f"thread{'s' * (launch['threads'] > 1)} ({self.ranks.launcher}), {self.precision}, ZeRO stage "
            f"{self.config.zero.stage}; kernels: {launch['kernels']}"
        )
        _LOG.info(
            f"{self.config.preset}: {numel / 1e6:.1f} million parameters; {self.plan.batch_samples} samples per step in "
            f"{launch['micro_batches']} micro-batch{'es' * (launch['micro_batches'] > 1)} per rank, "
            f"packing efficiency {first.packing_efficiency:.0%}; {self.plan.num_samples} training samples"
        )
        for reason in backend.reasons():
            _LOG.info(reason)
        for task, reason in self.plan.disabled_tasks.items():
            _LOG.info(f"task {task} is disabled: {reason}")
        for line in self.carried.lines() if self.carried else ():
            _LOG.info(line)
        if resume_from:
            _LOG.info(f"resuming from {resume_from}, after step {self.state.step} of {self.config.max_steps}")
        self.report.text("run", settings_table(launch))
        self.report.text("config", settings_table(run_folder.fixed_settings(self.config, self.stores)))
        self.report.text("state", settings_table(asdict(self.state)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups, with weight decay for matrices only.

    LayerNorm weights, biases and other vectors have no weight decay.

    DeepSpeed concatenates the weights of a group. Weights with a size that is not a multiple of 8 (a bias of 30,522
    words or of 1,601 classes) come last, because what follows them is not aligned to 16 bytes and is read by kernels
    element by element.
    """
    aligned_first = sorted(model.parameters(), key=lambda p: p.numel() % 8 != 0)
    matrices = [p for p in aligned_first if p.ndim >= 2]
    vectors = [p for p in aligned_first if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
