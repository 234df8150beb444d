"""Callbacks: what a run does between its steps besides training.

The trainer calls the callbacks and knows nothing else about them. The entry points (`pretrain.py`, `opt-ds finetune`)
pass those of `opt_ds.evaluation.callbacks`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from opt_ds.config import Config
from opt_ds.store.reader import FeatureStore
from opt_ds.training.checkpoint import TrainState
from opt_ds.training.distributed import ProcessGroup
from opt_ds.training.metrics import Reporter


class TrainingRun(Protocol):
    """The trainer, as callbacks see it.

    `engine.module` is the model. Callbacks must leave it in training mode.
    """

    config: Config
    stores: list[FeatureStore]
    group: ProcessGroup
    engine: Any  # deepspeed.DeepSpeedEngine
    plan: Any
    report: Reporter
    state: TrainState

    def is_due(self, every: int) -> bool:
        """Return whether an action that runs every `every` steps is due after this step.

        It is also due after the last step.
        """
        ...


class Callbacks:
    """Base class whose methods do nothing.

    All ranks call the same methods in the same order. `check` is the exception: only rank 0 calls it.
    """

    def check(self, config: Config, stores: Sequence[FeatureStore]) -> None:
        """Raise UserError, before training starts, for anything that could not be done during the run."""

    def reference_losses(self, run: TrainingRun) -> dict[str, float]:
        """Return loss name -> baseline value for the validation table, on rank 0; an empty dict on the other ranks."""
        return {}

    def after_validation(self, run: TrainingRun) -> None:
        """Run after the validation losses are reported."""

    def after_step(self, run: TrainingRun) -> None:
        """Run after every optimiser step. Its time does not count towards the measured throughput."""
