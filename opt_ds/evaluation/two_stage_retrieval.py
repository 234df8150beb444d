"""Two-stage retrieval: a first stage ranks all candidates, then the model re-ranks the best K.

The first stage is alignment if the model was trained with it, otherwise a dual projection of the frozen [CLS].

To rank N candidates for N queries, the model alone takes N² forward passes (of the encoder for the matching head, of
the text decoder for the likelihood). Two stages take 2 N + K N passes, and for the likelihood N more of the encoder.

Legend: q queries, c candidates, k shortlisted candidates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opt_ds.abilities import MATCH, WRITE_TEXT
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.alignment import AlignmentScores
from opt_ds.evaluation.controls import untrained
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.figures import Figure, Measured, beside, figure_lines, measure, percent, read_figure
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.projections import DIRECTIONS, Projections, Scores, texts_of
from opt_ds.evaluation.ranking import (
    chance,
    chance_among,
    likeliest,
    likeliest_first,
    recall_figures,
    reranked,
    shortlisted,
)
from opt_ds.evaluation.reading import read_recall
from opt_ds.evaluation.retrieval import joined, label_of, same_pairs

_ABILITY_OF = {"matching": MATCH, "likelihood": WRITE_TEXT}


def two_stage_retrieval(
    evaluator: Evaluator,
    split: str,
    shortlist: int,
    candidates: int | None = None,
    directions: Sequence[str] = tuple(DIRECTIONS),
    seed: int = 1,
) -> dict[str, Any]:
    """Return R@1/5/10 of each direction over one gallery, whose samples are both queries and candidates.

    The figures per direction are: `alignment` or `projection`, the first stage alone; `shortlist_recall`, the fraction
    of queries with a correct candidate in the shortlist; `matching` and (if text is one side) `likelihood`, the
    re-ranked order, with the number of encoder and decoder passes relative to all pairs. A direction whose modalities
    no sample has is omitted, and so is a score whose loss the model was not trained with.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        shortlist: Number of candidates that are re-ranked.
        candidates: Gallery size. None: all samples of the split.
        directions: Keys of DIRECTIONS.
        seed: Seed of the gallery and of the projection.

    Returns:
        The figures, as plain values.

    Raises:
        UserError: No direction or no score is left, or the shortlist is not shorter than the gallery.
    """
    if not evaluator.config.can(WRITE_TEXT):
        loss = evaluator.config.tasks.loss_for(WRITE_TEXT)
        evaluator.require(MATCH, f"predict whether inputs match, nor (without {loss}) how likely a text is")
    stages, without_training = TwoStages(evaluator, seed), Projections(untrained(evaluator), seed)
    needs = {name: {*DIRECTIONS[name][0], DIRECTIONS[name][1]} for name in directions}
    directions = [name for name in directions if evaluator.has_samples(split, sorted(needs[name]))]
    needed = set[int]().union(*(needs[name] for name in directions)) or {TEXT, IMAGE, AUDIO}
    gallery = evaluator.require_samples(split, sorted(needed), candidates, seed)
    if shortlist >= len(gallery):
        raise UserError(f"--shortlist {shortlist}: the gallery has {len(gallery)} samples: use a smaller value, or omit it")
    result: dict[str, Any] = {"split": split, "seed": seed, "candidates": len(gallery), "shortlist": shortlist,
                              "untrained_seed": evaluator.config.seed}  # fmt: skip
    for direction in directions:
        result[direction] = stages.figures(direction, gallery, gallery, shortlist, untrained_projections=without_training)
    return result


class TwoStages:
    """The two stages for one model and one store. Embeddings, [CLS] vectors and projections are computed once."""

    def __init__(self, evaluator: Evaluator, seed: int = 1) -> None:
        self.evaluator, self.projections = evaluator, Projections(evaluator, seed)
        self.alignment = AlignmentScores(evaluator)

    def figures(
        self,
        direction: str,
        queries: np.ndarray,
        gallery: np.ndarray,
        shortlist: int,
        scores: Sequence[str] = (),
        untrained_projections: Projections | None = None,
    ) -> dict[str, Any]:
        """Return recalls and costs of one direction.

        Args:
            direction: Key of DIRECTIONS.
            queries: Sample indices of the queries.
            gallery: Sample indices of the candidates.
            shortlist: Number of candidates that are re-ranked.
            scores: Scores to re-rank by. Empty: all that the model learned.
            untrained_projections: Projections of an untrained encoder, a control. None: without this control.

        Returns:
            The figures, as plain values.
        """
        same_qc = same_pairs(self.evaluator, queries, gallery, *DIRECTIONS[direction])
        first_qc = self.first_stage(direction, queries, gallery)
        name = "alignment" if self.alignment.ranks(direction) else "projection"
        best_qk = shortlisted(first_qc, shortlist)
        others: dict[str, np.ndarray] = {}
        if untrained_projections is not None:
            others["untrained_projection"] = untrained_projections.scores(direction, queries, gallery)
        found: dict[str, Any] = {
            "chance": chance(same_qc), name: beside(recall_figures(first_qc, same_qc, others)),
            **beside({"shortlist_recall": _shortlist_recall(first_qc, same_qc, shortlist, others)}),
        }  # fmt: skip
        others["alignment" if name == "alignment" else "trained_projection"] = first_qc
        encoded = len(queries) + len(gallery)
        can = self.evaluator.config.can
        for score in scores or [name for name, ability in _ABILITY_OF.items() if can(ability)]:
            if score == "likelihood" and not _has_likelihood(direction):
                continue
            rank = self.matching if score == "matching" else self.likelihood
            second_qk, encoder_runs, decoder_runs = rank(direction, queries, gallery, best_qk)
            encoder_runs += encoded
            found[score] = {
                **beside(recall_figures(reranked(first_qc, best_qk, second_qk), same_qc, others)), "encoder_runs": encoder_runs,
                "decoder_runs": decoder_runs, "all_pairs": first_qc.size, "encoder_fraction": encoder_runs / first_qc.size,
                "decoder_fraction": decoder_runs / first_qc.size,
            }  # fmt: skip
        return found

    def first_stage(self, direction: str, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Return the scores [q, c] of the first stage."""
        if self.alignment.ranks(direction):
            return self.alignment.scores(direction, queries, gallery)
        return self.projections.scores(direction, queries, gallery)

    def matching(self, direction: str, queries: np.ndarray, gallery: np.ndarray, best_qk: np.ndarray) -> Scores:
        """Return the matching head's scores of the shortlisted pairs. Each pair takes one encoder pass.

        Args:
            direction: Key of DIRECTIONS.
            queries: Sample indices of the queries.
            gallery: Sample indices of the candidates.
            best_qk: Gallery indices of the shortlist, int64 [q, k].

        Returns:
            Scores [q, k] and the numbers of passes.
        """
        query, target = DIRECTIONS[direction]
        label = label_of(query, target)
        scores_qk = np.empty(best_qk.shape, dtype=np.float32)
        for row, index in enumerate(queries):
            own = self.evaluator.read(index, query)
            pairs = [joined(own, self.evaluator.read(gallery[place], (target,))) for place in best_qk[row]]
            scores_qk[row] = self.evaluator.matching_scores(pairs)[:, label]
        return Scores(scores_qk, best_qk.size, 0)

    def likelihood(self, direction: str, queries: np.ndarray, gallery: np.ndarray, best_qk: np.ndarray) -> Scores:
        """Return log P(text | other side) of the shortlisted pairs.

        If texts are ranked, each query's `LIKELIEST` texts are ranked by likelihood over prior, and the other texts
        after them.

        Args:
            direction: Key of DIRECTIONS.
            queries: Sample indices of the queries.
            gallery: Sample indices of the candidates.
            best_qk: Gallery indices of the shortlist, int64 [q, k].

        Returns:
            Scores [q, k] and the numbers of passes.
        """
        query, target = DIRECTIONS[direction]
        read = self.evaluator.read
        if target == TEXT:
            samples = [read(index, query) for index in queries]
            ranked, places = np.unique(best_qk, return_inverse=True)  # texts that are in at least one shortlist
            texts, wanted_qk = texts_of(self.evaluator, gallery[ranked]), places.reshape(best_qk.shape)
            found_qk = np.stack(self.evaluator.text_log_likelihood_of(samples, texts, list(wanted_qk)))
            likely_qk = likeliest(found_qk)
            divided = np.unique(wanted_qk[likely_qk])
            log_priors = np.zeros(len(ranked))
            log_priors[divided], encoder_runs, decoder_runs = self.projections.log_priors(direction, gallery[ranked[divided]])
            scores_qk = likeliest_first(found_qk, found_qk - log_priors[wanted_qk], likely_qk)
            return Scores(scores_qk, len(queries) + encoder_runs, best_qk.size + decoder_runs)
        samples = [read(index, (target,)) for index in gallery]
        rows, columns = np.divmod(np.arange(best_qk.size), best_qk.shape[1])
        pairs_of = [np.flatnonzero(best_qk.reshape(-1) == place) for place in range(len(gallery))]
        texts = texts_of(self.evaluator, queries)
        found = self.evaluator.text_log_likelihood_of(samples, texts, [rows[flat] for flat in pairs_of])
        scores_qk = np.empty(best_qk.shape)
        for flat, values in zip(pairs_of, found, strict=True):
            scores_qk[rows[flat], columns[flat]] = values
        return Scores(scores_qk, len(np.unique(best_qk)), best_qk.size)


def _shortlist_recall(first_qc: np.ndarray, same_qc: np.ndarray, shortlist: int, others: Mapping[str, np.ndarray]) -> Figure:
    """Return the fraction of queries with a correct candidate in the shortlist, beside that of other first stages."""

    def found(scores_qc: np.ndarray) -> Measurement:
        correct_qk = np.take_along_axis(same_qc, shortlisted(scores_qc, shortlist), 1)
        return Measurement.mean(np.asarray(correct_qk.any(1)))

    by_chance = {"chance": Measured(Measurement.mean(chance_among(same_qc, shortlist)))}
    return measure(found(first_qc), by_chance | {name: Measured(found(scores_qc)) for name, scores_qc in others.items()})


def table(result: Mapping[str, Any]) -> str:
    """Return the figures as text: per direction and score a line, with its controls below, and the cost."""
    lines = [f"{result['candidates']} candidates of {result['split']}, the best {result['shortlist']} re-ranked"]
    for direction in (name for name in DIRECTIONS if name in result):
        found, name = result[direction], direction.replace("_to_", "→").replace("_", "+")
        for stage in (stage for stage in ("alignment", "projection", "matching", "likelihood") if stage in found):
            row = found[stage]
            lines += figure_lines(f"{name}, {stage}", read_recall({**row, "chance": found["chance"]}), percent)
            if "encoder_fraction" in row:
                encoder, decoder = row["encoder_fraction"], row["decoder_fraction"]
                lines.append(f"      {encoder:.2%} of the encoder runs, {decoder:.2%} of the decoder runs of all pairs")
        in_shortlist = read_figure(found, "shortlist_recall")
        lines += figure_lines(f"{name}, in the shortlist", {"recall": in_shortlist}, percent)
    return "\n".join(lines)


def _has_likelihood(direction: str) -> bool:
    query, target = DIRECTIONS[direction]
    return len(query) == 1 and TEXT in (*query, target)
