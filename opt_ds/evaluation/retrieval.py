"""Zero-shot retrieval in five directions.

The scores are the matching head's, the alignment's (if the model was trained with it) and, if text is one side, the text
decoder's likelihood. Beside them stand the recalls of a linear projection of [CLS], of the trained encoder and of an
untrained one.

A gallery of seeded candidates provides both queries and targets. Equal captions and identical images count as correct:
a hit is any candidate whose target is the same text, image or audio as the query's own. A hit is also any candidate of
the same query, such as each caption of an image.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from opt_ds.abilities import MATCH, WRITE_TEXT
from opt_ds.data.matching import MATCHING_LABELS
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.errors import UserError
from opt_ds.evaluation.alignment import AlignmentScores
from opt_ds.evaluation.controls import content_names
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.figures import figure_lines, percent
from opt_ds.evaluation.projections import DIRECTIONS, ProjectionControls, texts_of
from opt_ds.evaluation.ranking import likeliest, likeliest_first, log_mean_exp, recall_row
from opt_ds.evaluation.reading import SCORES, read_recall, score_name

_LABEL_OF_PAIR = {frozenset((IMAGE, AUDIO)): 1, frozenset((TEXT, AUDIO)): 2, frozenset((TEXT, IMAGE)): 3}


def retrieval(
    evaluator: Evaluator,
    split: str,
    candidates: int = 200,
    matching_candidates: int = 100,
    triple_candidates: int = 50,
    seed: int = 1,
    controls: ProjectionControls | None = None,
    transductive: bool = False,
) -> dict[str, Any]:
    """Return R@1/5/10 of each direction for several scores, each beside its controls.

    The gallery of a direction consists of samples that have its modalities. A direction without such samples is
    omitted, and so is a score whose loss the model was not trained with. If texts are ranked, short captions have the
    highest likelihoods. Therefore `likelihood` divides a text's likelihood by its prior, the mean over training inputs.
    `likelihood_raw` does not.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        candidates: Gallery size for the likelihoods and for the projection.
        matching_candidates: Gallery size for `matching`, smaller because the matching head must encode every pair.
        triple_candidates: Gallery size for `matching` if a pair consists of three modalities.
        seed: Seed of the galleries.
        controls: The projections. None: the controls are chance alone, and there is no prior.
        transductive: Add `likelihood_transductive`, whose prior is the mean over the evaluation's own queries. It uses
            what is not known of a single query, so it is no figure of the model.

    Returns:
        Direction -> score -> figures.

    Raises:
        UserError: No direction is left, or the model was trained with neither loss.
    """
    result: dict[str, Any] = {"split": split, "seed": seed}
    if controls is not None:
        result["untrained_seed"] = evaluator.config.seed
    writes, judges = (evaluator.config.can(ability) for ability in (WRITE_TEXT, MATCH))
    if not writes:
        loss = evaluator.config.tasks.loss_for(WRITE_TEXT)
        evaluator.require(MATCH, f"predict whether inputs match, nor (without {loss}) how likely a text is")
    gallery, small = (
        {other: evaluator.samples_with(split, (TEXT, other), count, seed) for other in (IMAGE, AUDIO)}
        for count in (candidates, matching_candidates)
    )
    there = [other for other in (IMAGE, AUDIO) if len(gallery[other])]
    if not there:
        raise UserError(f'{evaluator.store.path}: no sample of split "{split}" has text and an image or audio: choose another')
    likelihood = {other: _likelihood_matrix(evaluator, gallery[other], other) for other in there if writes}
    pairs = {other: _matching_matrix(evaluator, small[other], (TEXT,), other) for other in there if judges}
    alignment = AlignmentScores(evaluator)
    for direction, (query, target) in DIRECTIONS.items():
        table = _Table(evaluator, direction, controls, alignment)
        if len(query) == 1:
            (other,) = {*query, target} - {TEXT}
            if other not in there:
                continue
            if writes and target == TEXT:
                table.add_texts(likelihood[other], gallery[other], transductive)
            elif writes:
                table.add("likelihood", likelihood[other].T, gallery[other], prior="none")
            if judges:
                table.add("matching", pairs[other].T if target == TEXT else pairs[other], small[other])
            table.add_alignment(gallery[other])
            table.add_projection(gallery[other])
        else:
            ranked = evaluator.samples_with(split, (TEXT, IMAGE, AUDIO), triple_candidates, seed)
            if not len(ranked):
                continue
            if judges:
                table.add("matching", _matching_matrix(evaluator, ranked, query, target), ranked)
            table.add_alignment(ranked)
            table.add_projection(ranked)
        result[direction] = table.rows
    return result


class _Table:
    """The rows of one direction."""

    def __init__(
        self, evaluator: Evaluator, direction: str, controls: ProjectionControls | None, alignment: AlignmentScores
    ) -> None:
        self.evaluator, self.direction, self.alignment = evaluator, direction, alignment
        self.controls = controls if controls is not None and controls.can_fit(direction) else None
        self.rows: dict[str, Any] = {}

    def add(self, score: str, scores: np.ndarray, gallery: np.ndarray, **facts: Any) -> None:
        """Add the recall of scores [queries, targets] of a gallery."""
        same = same_pairs(self.evaluator, gallery, gallery, *DIRECTIONS[self.direction])
        others = self.controls.scores(self.direction, gallery) if self.controls else {}
        self.rows[score] = recall_row(scores, same, others, **facts)

    def add_texts(self, likelihood_qc: np.ndarray, gallery: np.ndarray, transductive: bool) -> None:
        """Add the recalls of texts by log likelihood [queries, texts]: over the prior of training inputs, and raw."""
        if self.controls:
            log_prior_c = self.controls.trained.log_priors(self.direction, gallery).values
            self.add("likelihood", over_prior(likelihood_qc, log_prior_c), gallery, prior="training inputs")
        self.add("likelihood_raw", likelihood_qc, gallery, prior="none")
        if transductive:
            over_queries = likelihood_qc - log_mean_exp(likelihood_qc, axis=0)
            self.add("likelihood_transductive", over_queries, gallery, prior="test queries")

    def add_alignment(self, gallery: np.ndarray) -> None:
        """Add the recall by alignment, if the model was trained with it."""
        if self.alignment.ranks(self.direction):
            self.add("alignment", self.alignment.scores(self.direction, gallery, gallery), gallery)

    def add_projection(self, gallery: np.ndarray) -> None:
        """Add the recall by the projection of the trained encoder, beside that of the untrained one."""
        if self.controls:
            others = self.controls.scores(self.direction, gallery)
            own = others.pop("trained_projection")
            same = same_pairs(self.evaluator, gallery, gallery, *DIRECTIONS[self.direction])
            self.rows["projection"] = recall_row(own, same, others)


def over_prior(log_likelihood_qc: np.ndarray, log_prior_c: np.ndarray) -> np.ndarray:
    """Return scores [q, c] that rank each query's likeliest texts by likelihood over prior, before the others."""
    return likeliest_first(log_likelihood_qc, log_likelihood_qc - log_prior_c[None, :], likeliest(log_likelihood_qc))


def retrieval_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures of `retrieval` as text: per direction and score a line, with its controls below."""
    lines = ["  retrieval"]
    for direction in (name for name in DIRECTIONS if name in figures):
        name = direction.replace("_to_", "→").replace("_", "+")
        for score, row in ((score, figures[direction][score]) for score in SCORES if score in figures[direction]):
            title = f"{name}, {score_name(direction, score, row)} of {row['candidates']}"
            lines += figure_lines(title, read_recall(row), percent)
    return lines


def _matching_matrix(evaluator: Evaluator, gallery: np.ndarray, query: tuple[int, ...], target: int) -> np.ndarray:
    """Return scores [queries, targets] of the matching label that means: exactly these modalities match."""
    label = label_of(query, target)
    targets = [evaluator.read(index, (target,)) for index in gallery]
    scores = np.empty((len(gallery), len(gallery)), dtype=np.float32)
    for row, index in enumerate(gallery):
        own = evaluator.read(index, query)
        pairs = [joined(own, other) for other in targets]
        scores[row] = evaluator.matching_scores(pairs)[:, label]
    return scores


def label_of(query: tuple[int, ...], target: int) -> int:
    """Return the index of the matching label that means: exactly these modalities match.

    It is an index into the matching head's scores.
    """
    return _LABEL_OF_PAIR.get(frozenset((*query, target)), MATCHING_LABELS.index("all"))


def joined(query: Sample, target: Sample) -> Sample:
    """Return the query's sample with the target's modalities added."""
    return replace(query, items=query.items | target.items)


def _likelihood_matrix(evaluator: Evaluator, gallery: np.ndarray, modality: int) -> np.ndarray:
    samples = [evaluator.read(index, (modality,)) for index in gallery]
    return evaluator.text_log_likelihood(samples, texts_of(evaluator, gallery))


def same_pairs(
    evaluator: Evaluator, queries: np.ndarray, candidates: np.ndarray, query: tuple[int, ...], target: int
) -> np.ndarray:
    """Return which candidates are correct, bool [queries, candidates].

    A candidate is correct if its target equals the query's own target, or if its query equals the query.

    Args:
        evaluator: The model and the store.
        queries: Sample indices of the queries.
        candidates: Sample indices of the candidates.
        query: Modalities of the query.
        target: Modality of the target.

    Returns:
        Whether each candidate is correct for each query.
    """

    def equal(modality: int) -> np.ndarray:
        names = content_names(evaluator, np.concatenate([queries, candidates]), modality)
        return names[: len(queries), None] == names[None, len(queries) :]

    return equal(target) | np.logical_and.reduce([equal(modality) for modality in query])
