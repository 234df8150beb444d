"""Experiment: generated texts, hard negatives and generated images, judged by the ground truth of the corpus `scenes`."""

from functools import partial
from pathlib import Path
from typing import Any

from opt_ds.evaluation.experiments import Experiment, Request
from opt_ds.evaluation.experiments.image_generation import open_dvae
from opt_ds.evaluation.scene_truth import scene_lines, scene_truth
from opt_ds.model.generation import text_decoding


class Scenes(Experiment):
    """See `opt_ds.evaluation.scene_truth`."""

    def measure(
        self, request: Request, *, truth: Path, limit: int, generate: int, beam_size: int, dvae: Path | None
    ) -> dict[str, Any]:
        """Return the figures of `scene_truth`, texts by beam search."""
        return scene_truth(
            request.evaluator,
            request.split,
            truth,
            partial(open_dvae, request.evaluator, dvae),
            limit=limit,
            generate=generate,
            seed=request.seed,
            options=text_decoding(beam_size),
        )

    def table(self, figures: dict[str, Any]) -> str:
        """Return one line per figure, with its controls, and what was left out."""
        return "\n".join(scene_lines(figures))


EXPERIMENT = Scenes()
