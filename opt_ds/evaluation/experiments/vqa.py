"""Experiment: accuracy of a model that was fine-tuned for visual question answering."""

from typing import Any

from opt_ds.abilities import LABEL
from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.experiments import Experiment, Request
from opt_ds.evaluation.vqa import vqa, vqa_lines


class Vqa(Experiment):
    """See `opt_ds.evaluation.vqa`."""

    ability_in_training = LABEL
    modalities = ((TEXT, IMAGE),)

    def measure(self, request: Request, *, limit: int | None) -> dict[str, Any]:
        """Return the figures of `vqa`."""
        return vqa(request.evaluator, request.split, limit=limit, seed=request.seed)

    def measure_in_training(self, evaluator: Evaluator, split: str, limit: int, seed: int) -> dict[str, Any]:
        """Return the figures of `vqa`."""
        return vqa(evaluator, split, limit=limit, seed=seed)

    def table(self, figures: dict[str, Any]) -> str:
        """Return the accuracy with its controls and upper bound."""
        return "\n".join(vqa_lines(figures))


EXPERIMENT = Vqa()
