"""Zero-shot retrieval: by all pairs, or in two stages."""

from typing import Any

from opt_ds.evaluate.experiments import Experiment, Request
from opt_ds.evaluate.retrieval import retrieval
from opt_ds.evaluate.summary import retrieval_lines
from opt_ds.evaluate.two_stage_retrieval import table, two_stage_retrieval


class Retrieval(Experiment):
    """See `opt_ds.evaluate.retrieval` and, with a shortlist, `opt_ds.evaluate.two_stage_retrieval`."""

    def measure(self, request: Request, *, candidates: int, matching_candidates: int, shortlist: int | None) -> dict[str, Any]:
        evaluator, split, seed = request.evaluator, request.split, request.seed
        if shortlist is not None:
            return two_stage_retrieval(evaluator, split, shortlist, candidates, seed=seed)
        return retrieval(evaluator, split, candidates, matching_candidates, matching_candidates, seed)

    def table(self, figures: dict[str, Any]) -> str:
        return table(figures) if "shortlist" in figures else "\n".join(retrieval_lines(figures))


EXPERIMENT = Retrieval()
