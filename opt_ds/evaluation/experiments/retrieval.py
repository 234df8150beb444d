"""Experiment: zero-shot retrieval, with all pairs or in two stages."""

from typing import Any

from opt_ds.abilities import MATCH
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.experiments import Experiment, Request
from opt_ds.evaluation.projections import ProjectionControls
from opt_ds.evaluation.retrieval import retrieval, retrieval_lines
from opt_ds.evaluation.two_stage_retrieval import table, two_stage_retrieval

# During training galleries are small, because the matching head encodes every pair: the square of the gallery's size.
_PAIRS, _TRIPLES = 50, 20


class Retrieval(Experiment):
    """See `opt_ds.evaluation.retrieval` and, with a shortlist, `opt_ds.evaluation.two_stage_retrieval`."""

    ability_in_training = MATCH
    modalities = ((TEXT, IMAGE), (TEXT, AUDIO))

    def measure(
        self, request: Request, *, candidates: int, matching_candidates: int, shortlist: int | None, transductive: bool
    ) -> dict[str, Any]:
        """Return the figures of `two_stage_retrieval` if there is a shortlist, otherwise of `retrieval`."""
        evaluator, split, seed = request.evaluator, request.split, request.seed
        if shortlist is not None:
            if transductive:
                raise UserError("--transductive: not possible with --shortlist: omit one of them")
            return two_stage_retrieval(evaluator, split, shortlist, candidates, seed=seed)
        controls = ProjectionControls(evaluator, seed)
        return retrieval(
            evaluator, split, candidates, matching_candidates, matching_candidates, seed, controls, transductive
        )

    def measure_in_training(self, evaluator: Evaluator, split: str, limit: int, seed: int) -> dict[str, Any]:
        """Return the figures of `retrieval` with small galleries, without projections and so without priors."""
        return retrieval(evaluator, split, limit, min(limit, _PAIRS), min(limit, _TRIPLES), seed)

    def table(self, figures: dict[str, Any]) -> str:
        """Return one line per direction and score, with its controls."""
        return table(figures) if "shortlist" in figures else "\n".join(retrieval_lines(figures))


EXPERIMENT = Retrieval()
