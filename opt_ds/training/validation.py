"""Validation loss per task: a fixed pass that evaluates every task on every sample, summed over ranks."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from opt_ds.config import Config
from opt_ds.data.finetune_plan import make_plan
from opt_ds.data.loader import MicroBatchLoader
from opt_ds.model.opt import OPT
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.global_loss import global_losses
from opt_ds.training.metrics import TermSums

if TYPE_CHECKING:
    from opt_ds.training.distributed import ProcessGroup


@dataclass(frozen=True)
class ValidationResult:
    """Result of a validation pass.

    It holds the mean of each active loss, the accuracy where the task classifies, and the weighted sum that early
    stopping monitors.

    Without any loss the weighted sum is NaN. The 0 of an empty sum would be better than every loss.
    """

    losses: dict[str, float]
    accuracies: dict[str, float]
    weighted: float


@torch.no_grad()
def validation_losses(model: torch.nn.Module, config: Config, loader: MicroBatchLoader, reduce=None) -> ValidationResult:
    """Run the validation pass for the rank of `loader`.

    Args:
        model: An `OPT` or its engine, which returns a dict of LossTerm for a batch. Its training mode is restored
            afterwards.
        config: The run's configuration.
        loader: Loader of this rank's validation batches.
        reduce: Sums a float64 tensor over the ranks in place. None: there is one rank.

    Returns:
        Losses, accuracies and the weighted loss, over all ranks.
    """
    was_training = model.training
    model.eval()
    all_losses = config.tasks.all_losses
    table = torch.zeros(len(all_losses), 3, dtype=torch.float64)  # columns: sum, count, correct
    classifies = set()
    compared, scale = global_losses(loader.plan, loader.device), TermSums()
    for step_plan, batches in loader.validation(config.train.validate_samples):
        scale.add_counts(step_plan.counts, step_plan.divisors)
        for over_pass in compared.values():
            over_pass.begin(step_plan.samples)
        for batch in batches:
            terms = model(batch)
            for task, over_pass in compared.items():
                over_pass.add(batch.parts[task], terms)
            for loss, term in terms.items():
                row = table[all_losses.index(loss)]
                row[0] += float(term.sum)
                row[1] += term.count
                if "correct" in term.metrics:
                    classifies.add(loss)
                    row[2] += float(term.metrics["correct"])
    model.train(was_training)
    if reduce is not None:
        reduce(table)
    for over_pass in compared.values():  # over all ranks
        for loss, term in over_pass.combine(reduce or (lambda tensor: tensor), with_gradient=False).items():
            values = (float(term.sum), term.count, float(term.metrics["correct"]))
            table[all_losses.index(loss)] = torch.tensor(values, dtype=torch.float64)
    rows = {loss: table[i].tolist() for i, loss in enumerate(all_losses)}
    active = [loss for loss in config.tasks.active_losses if rows[loss][1] > 0]
    losses = {loss: rows[loss][0] / rows[loss][1] for loss in active}
    accuracies = {loss: rows[loss][2] / rows[loss][1] for loss in active if loss in classifies}
    weighted = scale.weighted(losses, config.tasks) if losses else math.nan
    return ValidationResult(losses, accuracies, weighted)


def validate(
    model: OPT,
    config: Config,
    store: FeatureStore,
    device: torch.device | str = "cpu",
    group: "ProcessGroup | None" = None,
) -> ValidationResult:
    """Run the validation pass for a model on one store.

    Args:
        model: The model.
        config: Its configuration.
        store: The store.
        device: Device of the model.
        group: The ranks that share the work. None: this process alone.

    Returns:
        Losses, accuracies and the weighted loss, over all ranks.
    """
    rank, world_size = (group.ranks.rank, group.ranks.world_size) if group else (0, 1)
    loader = MicroBatchLoader(make_plan(config, [store]), rank, world_size, torch.device(device))
    try:
        return validation_losses(model, config, loader, group.sum if group else None)
    finally:
        loader.close()
