"""Retrieval by alignment: cosine of the embeddings that `opt_ds.tasks.alignment` trained, without fitting anything.

Legend: q queries, c candidates, d width of the shared space.
"""

import numpy as np

from opt_ds.abilities import ALIGN
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.projections import DIRECTIONS
from opt_ds.tasks.views import PAIRS, VIEWS

_VIEW_OF = {frozenset(modalities): view for view, modalities in VIEWS.items()}


class AlignmentScores:
    """The embeddings of one model on one store. Each view of a sample is encoded once."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self._known: dict[str, dict[int, np.ndarray]] = {}

    def ranks(self, direction: str) -> bool:
        """Return whether the model was pre-trained to align both sides of a direction.

        A fine-tuned encoder has changed since, so a projection is fitted for it.
        """
        config = self.evaluator.config
        if config.tasks.alignment is None or config.finetune is not None or not config.can(ALIGN):
            return False
        return {*_views_of(direction)} in [{*PAIRS[pair]} for pair in config.tasks.alignment.pairs]

    def scores(self, direction: str, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Return the cosines [q, c] of samples as queries and of samples as candidates."""
        query, target = _views_of(direction)
        return self.embeddings(queries, query) @ self.embeddings(gallery, target).T

    def embeddings(self, samples: np.ndarray, view: str) -> np.ndarray:
        """Return the embeddings of a view of these samples, float32 [samples, d]."""
        known = self._known.setdefault(view, {})
        new = [int(index) for index in np.unique(samples) if int(index) not in known]
        read = [self.evaluator.read(index, VIEWS[view]) for index in new]
        known.update(zip(new, self.evaluator.alignment_embeddings(read, view), strict=True))
        return np.stack([known[int(index)] for index in samples])


def _views_of(direction: str) -> tuple[str, str]:
    """Return the views of the query and of the target."""
    query, target = DIRECTIONS[direction]
    return _VIEW_OF[frozenset(query)], _VIEW_OF[frozenset((target,))]
