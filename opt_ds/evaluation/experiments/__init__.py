"""The experiments of `opt-ds evaluate`, one per file: what each one requires, how it measures, what it prints.

To add one, write `opt_ds/evaluation/experiments/<name>.py` with `EXPERIMENT`, an instance of a subclass of
`Experiment`. Then add its options to `opt_ds/cli/evaluation_options.py`, and a row to the table in
`opt_ds/cli/evaluate.py`.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from opt_ds.evaluation.reranking import ImageRater

if TYPE_CHECKING:
    from opt_ds.evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class Request:
    """Input of every experiment.

    Attributes:
        evaluator: The model and the store, checked against each other.
        splits: The splits to measure on; a single one, except in summary.
        checkpoint: The run or checkpoint, as the user specified it.
        output: The JSON file that the figures are written to. An experiment may write images into the same folder.
        seed: Seed of the choice of samples and of sampling.
        open_rater: Opens the model's image extractor. Its argument is the extractor's weights, or None if a package
            includes them.
    """

    evaluator: "Evaluator"
    splits: tuple[str, ...]
    checkpoint: Path
    output: Path
    seed: int
    open_rater: Callable[[Path | None], ImageRater]

    @property
    def split(self) -> str:
        """The split of an experiment that measures on a single one."""
        (split,) = self.splits
        return split


class Experiment(ABC):
    """Base class of experiments. `measure` takes the options of its row in the table as keyword arguments."""

    #: Ability (`opt_ds.abilities`) that a model in training must learn for `measure_in_training`; None: trained models
    #: only.
    ability_in_training: ClassVar[str | None] = None
    #: Alternative sets of modalities that its samples must have.
    modalities: ClassVar[tuple[tuple[int, ...], ...]] = ()
    #: Whether the store must have image codes.
    needs_image_codes: ClassVar[bool] = False
    #: (Ability that the model must have, what it cannot do otherwise: part of the error message.)
    needs: ClassVar[tuple[tuple[str, str], ...]] = ()

    @abstractmethod
    def measure(self, request: Request, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Return the figures, which are written as JSON.

        Raise UserError if the model or the store does not allow the experiment.
        """

    def measure_in_training(self, evaluator: "Evaluator", split: str, limit: int, seed: int) -> dict[str, Any]:
        """Return the figures of a model in training, with greedy decoding.

        Args:
            evaluator: The model and the store.
            split: Name of the split.
            limit: Maximum number of samples.
            seed: Seed of the choice of samples.

        Returns:
            The figures, as plain values.
        """
        raise TypeError(f"{type(self).__name__} measures trained models only")

    @abstractmethod
    def table(self, figures: dict[str, Any]) -> str:
        """Return the figures as text for a terminal."""

    def report(self, request: Request, figures: dict[str, Any]) -> str:
        """Return the text that is printed at the end."""
        return self.table(figures)


def load_experiment(name: str) -> Experiment:
    """Return the experiment of this name. Raise UserError if an extra that it requires is not installed."""
    experiment: Experiment = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").EXPERIMENT
    return experiment
