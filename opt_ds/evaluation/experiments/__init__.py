"""The experiments of `opt-ds evaluate`, one per file: what each needs, how it measures, what it prints.

To add one: write `opt_ds/evaluation/experiments/<name>.py` with `EXPERIMENT`, an instance of a subclass of `Experiment`, and
add a row with its options to the table in `opt_ds/cli/evaluate.py`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from opt_ds.data.sample import Sample
    from opt_ds.evaluation.evaluator import Evaluator


class ImageJudge(Protocol):
    """Looks at images with the image extractor of the evaluated model."""

    def belongs(self, sample: "Sample", picture: "Image.Image") -> float:
        """Return the matching head's probability that the image belongs to the sample's text and audio."""

    def look(self, picture: "Image.Image") -> "np.ndarray":
        """Return the feature vector of an image."""


@dataclass(frozen=True)
class Request:
    """What every experiment is given.

    Attributes:
        evaluator: The model and the store, checked against each other.
        splits: The splits to measure on; one, except in summary.
        checkpoint: The run or checkpoint, as it was named.
        output: The JSON file that the figures are written to. An experiment may write images beside it.
        seed: Of the choice of samples and of sampling.
        open_judge: Opens the model's image extractor; its argument: the extractor's weights, None if a package brings them.
    """

    evaluator: "Evaluator"
    splits: tuple[str, ...]
    checkpoint: Path
    output: Path
    seed: int
    open_judge: Callable[[Path | None], ImageJudge]

    @property
    def split(self) -> str:
        """The one split of an experiment that measures on one."""
        (split,) = self.splits
        return split


class Experiment:
    """One experiment. `measure` takes the options of its row in the table as keyword arguments."""

    #: ability (`opt_ds.abilities`) that a model in training must learn for `measure_in_training`; None: only for trained models
    ability_in_training: ClassVar[str | None] = None
    #: modalities of its samples: one set or another
    modalities: ClassVar[tuple[tuple[int, ...], ...]] = ()
    #: whether the store must have image codes
    needs_image_codes: ClassVar[bool] = False
    #: (ability that the model must have, what it cannot do otherwise: part of the message)
    needs: ClassVar[tuple[tuple[str, str], ...]] = ()

    def measure(self, request: Request, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Return the figures, which are written as JSON. Raises UserError for what the model or the store does not allow."""
        raise NotImplementedError

    def measure_in_training(self, evaluator: "Evaluator", split: str, limit: int, seed: int) -> dict[str, Any]:
        """Return the figures of a model in training: greedy decoding, at most `limit` samples."""
        raise NotImplementedError

    def table(self, figures: dict[str, Any]) -> str:
        """Return the figures as text for a terminal."""
        raise NotImplementedError

    def report(self, request: Request, figures: dict[str, Any]) -> str:
        """Return what is printed at the end."""
        return self.table(figures)


def load_experiment(name: str) -> Experiment:
    """Return the experiment of this name. Raises UserError if an extra that it needs is not installed."""
    experiment: Experiment = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").EXPERIMENT
    return experiment
