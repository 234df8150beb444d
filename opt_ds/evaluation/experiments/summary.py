"""Experiment: the summary at the end of pre-training, with validation losses and one table per held-out split."""

from pathlib import Path
from typing import Any

from opt_ds.evaluation.experiments import Experiment, Request
from opt_ds.evaluation.experiments.image_generation import open_dvae
from opt_ds.evaluation.summary import summarize, table


class Summary(Experiment):
    """See `opt_ds.evaluation.summary`."""

    def measure(
        self, request: Request, *, candidates: int, matching_candidates: int, dvae: Path | None, truth: Path | None
    ) -> dict[str, Any]:
        """Return the figures of `summarize`."""
        evaluator, splits = request.evaluator, list(request.splits)
        generates = evaluator.store.has_codes and (evaluator.store.has_pixels or truth is not None)
        generator = open_dvae(evaluator, dvae) if generates else None
        folder = request.output.parent
        return summarize(evaluator, generator, splits, folder, candidates, matching_candidates, request.seed, truth)

    def table(self, figures: dict[str, Any]) -> str:
        """Return the summary as text."""
        return table(figures)

    def report(self, request: Request, figures: dict[str, Any]) -> str:
        """Return the summary and the paths of the files that belong to it."""
        grids = [figures["splits"][split].get("image_grid") for split in request.splits]
        return "\n".join([
            self.table(figures),
            f"\ncheckpoint    {request.checkpoint}\nfigures       {request.output}",
            *(f"image grid    {request.output.parent / grid}" for grid in grids if grid),
            f"curves        tensorboard --logdir {request.checkpoint}",
        ])  # fmt: skip


EXPERIMENT = Summary()
