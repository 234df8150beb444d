"""Experiment: texts, hard negatives, probes and generated images, judged by the ground truth of the corpus `scenes`."""

from functools import partial
from pathlib import Path
from typing import Any

from opt_ds.evaluation.experiments import Experiment, Request
from opt_ds.evaluation.experiments.image_generation import open_dvae
from opt_ds.evaluation.scene_truth import SampleCounts, SceneTruth, scene_lines
from opt_ds.model.generation import image_decoding, text_decoding


class Scenes(Experiment):
    """See `opt_ds.evaluation.scene_truth`."""

    def measure(
        self,
        request: Request,
        *,
        truth: Path,
        limit: int,
        probe: int,
        generate: int,
        beam_size: int,
        dvae: Path | None,
        top_k: int,
        top_p: float,
        temperature: float,
        guidance: float,
    ) -> dict[str, Any]:
        """Return the figures of one split: texts by beam search, images by sampling.

        Raise UserError if the model, the store or the truth file do not allow what is requested.
        """
        if generate and guidance != 1:
            request.evaluator.require_guidance()
        scenes = SceneTruth(
            request.evaluator,
            truth,
            partial(open_dvae, request.evaluator, dvae),
            seed=request.seed,
            options=text_decoding(beam_size),
            sampling=image_decoding(top_k, top_p, temperature, request.seed, guidance),
        )
        return scenes.measure(request.split, SampleCounts(limit, probe, generate))

    def table(self, figures: dict[str, Any]) -> str:
        """Return one line per figure, with its controls, and what was left out."""
        return "\n".join(scene_lines(figures))


EXPERIMENT = Scenes()
