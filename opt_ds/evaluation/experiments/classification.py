"""Experiment: mean average precision of a linear probe on the frozen model."""

from typing import Any

from opt_ds.evaluation.classification import classification, classification_lines
from opt_ds.evaluation.experiments import Experiment, Request


class Classification(Experiment):
    """See `opt_ds.evaluation.classification`."""

    def measure(
        self, request: Request, *, train_split: str, min_positives: int, regularisation: float, limit: int | None
    ) -> dict[str, Any]:
        """Return the figures of `classification`."""
        return classification(
            request.evaluator,
            request.split,
            train_split,
            min_positives=min_positives,
            regularisation=regularisation,
            limit=limit,
            seed=request.seed,
        )

    def table(self, figures: dict[str, Any]) -> str:
        """Return the mAP per subset, with its controls."""
        return "\n".join(classification_lines(figures))


EXPERIMENT = Classification()
