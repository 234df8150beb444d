"""Experiments at intervals during training: the functions of `opt-ds evaluate` on fewer samples, with flat figures."""

from collections.abc import Collection
from typing import Any

import numpy as np

from opt_ds.config import Config, EvaluateConfig
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.experiments import load_experiment
from opt_ds.store.reader import FeatureStore

_FIGURES = ("R@1", "R@5", "R@10", "wer", "cer", "wer_shuffled_audio", "bleu_4", "cider", "bits_per_code", "accuracy")


def check_experiments(config: Config, store: FeatureStore) -> None:
    """Raise UserError if an experiment of `evaluate.experiments` cannot run during training on this store."""
    options = config.evaluate
    if not options.every_steps:
        return
    for name in options.experiments:
        experiment = load_experiment(name)  # so that a missing extra is reported now and not during the run
        ability = experiment.ability_in_training
        assert ability is not None, "the configuration lists the experiments that run in training"
        if not config.can(ability):
            loss = config.tasks.loss_for(ability)
            raise UserError(f"evaluate.experiments has {name}, but the model is not trained with {loss}: remove it")
        if experiment.needs_image_codes and not store.has_codes:
            raise UserError(f"evaluate.experiments has {name}, but {store.path} has no image codes: remove it")
        found = max(_count_with(store, options.split, modalities) for modalities in experiment.modalities)
        if found < 2:
            raise UserError(
                f'evaluate.experiments has {name}, but split "{options.split}" of {store.path} has {found} samples with all that '
                "it needs: remove it, or choose another evaluate.split"
            )


def _count_with(store: FeatureStore, split: str, modalities: Collection[int]) -> int:
    """Return how many samples of the split have these modalities. Only the counts in the store's index are read."""
    counts, wanted = store.split_subsets(split), sum(1 << modality for modality in modalities)
    return int(counts[np.arange(len(counts)) & wanted == wanted].sum())


def figures_during_training(evaluator: Evaluator, options: EvaluateConfig, seed: int) -> dict[str, float]:
    """Return "evaluate/<experiment>/…" -> figure.

    Decoding is greedy and galleries have at most `options.limit` samples.
    """
    figures: dict[str, float] = {}
    for name in options.experiments:
        measured = load_experiment(name).measure_in_training(evaluator, options.split, options.limit, seed)
        for key, value in _flat(measured, f"evaluate/{name}").items():
            if key.rpartition("/")[2] in _FIGURES:
                figures[key] = value
    return figures


def _flat(tree: dict[str, Any], path: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in tree.items():
        if key in ("chance", "decoding", "constant_caption", "constant_answer", "another_image"):
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{path}/{key}")
        elif isinstance(value, (int, float)):
            found[f"{path}/{key}"] = float(value)
    return found
