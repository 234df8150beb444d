"""What a run does between its steps besides training: the trainer calls it, and knows nothing else of it.

The entry points (`pretrain.py`, `opt-ds finetune`) hand over evaluation's (`opt_ds.evaluation.callbacks`).
"""

from collections.abc import Sequence
from typing import Any, Protocol

from opt_ds.config import Config
from opt_ds.store.reader import FeatureStore
from opt_ds.training.checkpoint import TrainState
from opt_ds.training.distributed import ProcessGroup
from opt_ds.training.metrics import Reporter


class TrainingRun(Protocol):
    """What callbacks see of the trainer. `engine.module` is the model; callbacks leave it in training mode."""

    config: Config
    stores: list[FeatureStore]
    group: ProcessGroup
    engine: Any  # deepspeed.DeepSpeedEngine
    plan: Any
    report: Reporter
    state: TrainState

    def is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and at the end, is to be done after this one."""
        ...


class Callbacks:
    """Does nothing. All ranks call the same methods in the same order, except `check`, which rank 0 alone calls."""

    def check(self, config: Config, stores: Sequence[FeatureStore]) -> None:
        """Raise UserError, before anything is trained, for what could not be done during the run."""

    def reference_losses(self, run: TrainingRun) -> dict[str, float]:
        """Return loss name -> value that the validation table shows beside the model's; on rank 0, empty on the others."""
        return {}

    def after_validation(self, run: TrainingRun) -> None:
        """Called once the validation losses are reported."""

    def after_step(self, run: TrainingRun) -> None:
        """Called after every optimiser step, outside the time that the throughput is measured over."""
