"""Two-stage retrieval: a dual projection of the frozen [CLS] ranks all candidates, then the model re-ranks the best K.

To rank N candidates for N queries, the model alone takes N² forward passes (of the encoder for the matching head, of
the text decoder for the likelihood). Two stages take 2 N + K N passes, and for the likelihood N more of the encoder.

Legend: q queries, c candidates, k shortlisted candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from opt_ds.abilities import MATCH, WRITE_TEXT
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.dual_projection import DualProjection, Pairs, fit_dual_projection
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.retrieval import (
    DIRECTIONS,
    RANKS,
    chance,
    content_names,
    joined,
    label_of,
    log_mean_exp,
    recall,
    same_pairs,
)

#: Number of training inputs whose mean likelihood estimates a text's prior, where texts are ranked. They are the
#: nearest inputs by the projection. Other inputs would contribute little, because nearly all of a text's likelihood
#: comes from the few inputs that it nearly fits.
PRIOR_INPUTS = 32
#: Number of likeliest texts per query whose likelihood is divided by their prior (re-ranking of the N best: Li et al.
#: 2016). The prior of a text that no training input explains is close to 0, so that text would otherwise win for every
#: query.
LIKELIEST = 50
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

    The figures per direction are: `projection`, the first stage alone; `shortlist_recall`, the fraction of queries with
    a correct candidate in the shortlist; `matching` and (if text is one side) `likelihood`, the re-ranked order, with
    the number of encoder and decoder passes relative to all pairs. A direction whose modalities no sample has is
    omitted, and so is a score whose loss the model was not trained with.

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
    stages = TwoStages(evaluator, seed)
    needs = {name: {*DIRECTIONS[name][0], DIRECTIONS[name][1]} for name in directions}
    directions = [name for name in directions if evaluator.has_samples(split, sorted(needs[name]))]
    needed = set[int]().union(*(needs[name] for name in directions)) or {TEXT, IMAGE, AUDIO}
    gallery = evaluator.require_samples(split, sorted(needed), candidates, seed)
    if shortlist >= len(gallery):
        raise UserError(f"--shortlist {shortlist}: the gallery has {len(gallery)} samples: use a smaller value, or omit it")
    result: dict[str, Any] = {"split": split, "seed": seed, "candidates": len(gallery), "shortlist": shortlist}
    for direction in directions:
        result[direction] = stages.figures(direction, gallery, gallery, shortlist)
    return result


class _Fitted(NamedTuple):
    """A direction's projection and the samples that it was fitted on."""

    projection: DualProjection
    samples: np.ndarray  # int64 [n], of the training split
    query_ne: np.ndarray  # their [CLS], float32 [n, e]


class Scores(NamedTuple):
    """Scores, and the numbers of encoder and decoder passes that they took."""

    values: np.ndarray
    encoder_runs: int
    decoder_runs: int


@dataclass
class TwoStages:
    """The two stages for one model and one store. [CLS] vectors and projections are computed once."""

    evaluator: Evaluator
    seed: int = 1
    _fitted: dict[str, _Fitted] = field(default_factory=dict)
    _cls: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def figures(
        self, direction: str, queries: np.ndarray, gallery: np.ndarray, shortlist: int, scores: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return recalls and costs of one direction.

        Args:
            direction: Key of DIRECTIONS.
            queries: Sample indices of the queries.
            gallery: Sample indices of the candidates.
            shortlist: Number of candidates that are re-ranked.
            scores: Scores to re-rank by. Empty: all that the model learned.

        Returns:
            The figures, as plain values.
        """
        same_qc = same_pairs(self.evaluator, queries, gallery, *DIRECTIONS[direction])
        first_qc = self.first_stage(direction, queries, gallery)
        best_qk = shortlisted(first_qc, shortlist)
        found: dict[str, Any] = {
            "chance": chance(same_qc), "projection": recall(first_qc, same_qc),
            "shortlist_recall": float(np.take_along_axis(same_qc, best_qk, 1).any(1).mean()),
        }  # fmt: skip
        encoded = len(queries) + len(gallery)
        can = self.evaluator.config.can
        for score in scores or [name for name, ability in _ABILITY_OF.items() if can(ability)]:
            if score == "likelihood" and not _has_likelihood(direction):
                continue
            rank = self.matching if score == "matching" else self.likelihood
            second_qk, encoder_runs, decoder_runs = rank(direction, queries, gallery, best_qk)
            encoder_runs += encoded
            found[score] = {
                **recall(reranked(first_qc, best_qk, second_qk), same_qc), "encoder_runs": encoder_runs,
                "decoder_runs": decoder_runs, "all_pairs": first_qc.size,
                "encoder_fraction": encoder_runs / first_qc.size, "decoder_fraction": decoder_runs / first_qc.size,
            }  # fmt: skip
        return found

    def first_stage(self, direction: str, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Return the dual projection's scores [q, c]."""
        query, target = DIRECTIONS[direction]
        return self._fit(direction).projection.scores(self._vectors(queries, query), self._vectors(gallery, (target,)))

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
        read, texts_of = self.evaluator.read, self._texts
        if target == TEXT:
            samples = [read(index, query) for index in queries]
            ranked, places = np.unique(best_qk, return_inverse=True)  # texts that are in at least one shortlist
            texts, wanted_qk = texts_of(gallery[ranked]), places.reshape(best_qk.shape)
            found_qk = np.stack(self.evaluator.text_log_likelihood_of(samples, texts, list(wanted_qk)))
            likely_qk = _likeliest(found_qk)
            divided = np.unique(wanted_qk[likely_qk])
            log_priors = np.zeros(len(ranked))
            log_priors[divided], encoder_runs, decoder_runs = self._log_priors(direction, gallery[ranked[divided]])
            scores_qk = _likeliest_first(found_qk, found_qk - log_priors[wanted_qk], likely_qk)
            return Scores(scores_qk, len(queries) + encoder_runs, best_qk.size + decoder_runs)
        samples = [read(index, (target,)) for index in gallery]
        rows, columns = np.divmod(np.arange(best_qk.size), best_qk.shape[1])
        pairs_of = [np.flatnonzero(best_qk.reshape(-1) == place) for place in range(len(gallery))]
        found = self.evaluator.text_log_likelihood_of(samples, texts_of(queries), [rows[flat] for flat in pairs_of])
        scores_qk = np.empty(best_qk.shape)
        for flat, values in zip(pairs_of, found, strict=True):
            scores_qk[rows[flat], columns[flat]] = values
        return Scores(scores_qk, len(np.unique(best_qk)), best_qk.size)

    def _log_priors(self, direction: str, samples: np.ndarray) -> Scores:
        """Return the log prior of these samples' texts, float64 [samples].

        The prior is the mean likelihood over the nearest training inputs.
        """
        nearest_kt = self._prior_inputs(direction, samples)
        inputs, places = np.unique(nearest_kt, return_inverse=True)
        rows, texts = places.reshape(-1), np.tile(np.arange(len(samples)), len(nearest_kt))
        order = np.argsort(rows, kind="stable")  # grouped by input
        wanted = np.split(texts[order], np.cumsum(np.bincount(rows))[:-1])
        read = [self.evaluator.read(index, DIRECTIONS[direction][0]) for index in inputs]
        found = self.evaluator.text_log_likelihood_of(read, self._texts(samples), wanted)
        values = np.empty(nearest_kt.size)
        values[order] = np.concatenate(found)
        return Scores(log_mean_exp(values.reshape(nearest_kt.shape), axis=0)[0], len(inputs), nearest_kt.size)

    def _prior_inputs(self, direction: str, samples: np.ndarray) -> np.ndarray:
        """Return the training samples that are nearest to these samples' texts, int64 [k, samples].

        The distance is that of the projection.
        """
        fitted = self._fit(direction)
        scores_nt = fitted.projection.scores(fitted.query_ne, self._vectors(samples, (TEXT,)))
        count = min(PRIOR_INPUTS, len(fitted.samples))
        return fitted.samples[np.sort(np.argpartition(-scores_nt, count - 1, axis=0)[:count], axis=0)]

    def _fit(self, direction: str) -> _Fitted:
        """Return the direction's projection. It is fitted at the first call."""
        if direction not in self._fitted:
            query, target = DIRECTIONS[direction]
            data = self.evaluator.config.data
            fitted_on = []
            for split in (data.train_split, data.valid_split):
                samples = self.evaluator.samples_with(split, (*query, target))
                if not len(samples):
                    raise UserError(f"{self.evaluator.store.path}: split {split} has no sample to fit {direction} on")
                names = content_names(self.evaluator, samples, target)
                fitted_on.append((samples, Pairs(self._vectors(samples, query), self._vectors(samples, (target,)), names)))
            (train_samples, train), (_, valid) = fitted_on
            projection = fit_dual_projection(train, valid, seed=self.seed)
            self._fitted[direction] = _Fitted(projection, train_samples, train.query_ne)
        return self._fitted[direction]

    def _vectors(self, samples: np.ndarray, modalities: tuple[int, ...]) -> np.ndarray:
        """Return the [CLS] of these modalities, float32 [samples, e]. Each sample is encoded once."""
        width, store = self.evaluator.config.model.hidden_size, self.evaluator.store
        empty = (np.empty((store.num_samples, width), np.float32), np.zeros(store.num_samples, bool))
        vectors, known = self._cls.setdefault(modalities, empty)
        new = np.unique(samples[~known[samples]])
        vectors[new] = self.evaluator.cls_vectors([self.evaluator.read(index, modalities) for index in new])
        known[new] = True
        return vectors[samples]

    def _texts(self, samples: np.ndarray) -> list[np.ndarray]:
        return [self.evaluator.read(index, (TEXT,)).of(TEXT).ids for index in samples]


def shortlisted(first_qc: np.ndarray, shortlist: int) -> np.ndarray:
    """Return the gallery indices of the first stage's best candidates in ascending order, int64 [q, k]."""
    return np.sort(np.argpartition(-first_qc, shortlist - 1, axis=1)[:, :shortlist], axis=1)


def _likeliest(log_likelihood_qk: np.ndarray) -> np.ndarray:
    """Return which texts are among the `LIKELIEST` of each query, bool [q, k]."""
    count = min(LIKELIEST, log_likelihood_qk.shape[1])
    likely_qk = np.zeros(log_likelihood_qk.shape, dtype=bool)
    np.put_along_axis(likely_qk, np.argpartition(-log_likelihood_qk, count - 1, axis=1)[:, :count], True, axis=1)
    return likely_qk


def _likeliest_first(log_likelihood_qk: np.ndarray, over_prior_qk: np.ndarray, likely_qk: np.ndarray) -> np.ndarray:
    """Return scores [q, k]: the likeliest texts by likelihood over prior, then the other texts by likelihood."""
    least_q = np.where(likely_qk, over_prior_qk, np.inf).min(1, keepdims=True)
    return np.where(likely_qk, over_prior_qk, least_q + log_likelihood_qk - log_likelihood_qk.max(1, keepdims=True) - 1)


def reranked(first_qc: np.ndarray, best_qk: np.ndarray, second_qk: np.ndarray) -> np.ndarray:
    """Return scores [q, c] that rank the shortlist first, in the second stage's order.

    The other candidates follow in the first stage's order.
    """
    scores_qc = first_qc.astype(np.float64) - first_qc.max(1, keepdims=True)
    np.put_along_axis(scores_qc, best_qk, second_qk - second_qk.min(1, keepdims=True) + 1, axis=1)
    return scores_qc


def table(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [
        f"{result['candidates']} candidates of {result['split']}, the best {result['shortlist']} re-ranked",
        f"  {'':<22}{'':<14}" + "".join(f"{f'R@{k}':>8}" for k in RANKS) + "   encoder, decoder runs of all pairs",
    ]
    for direction in (name for name in DIRECTIONS if name in result):
        found, name = result[direction], direction.replace("_to_", "→").replace("_", "+")
        for stage in ("projection", "matching", "likelihood"):
            if stage in found:
                cells = "".join(f"{found[stage][f'R@{k}']:>8.1%}" for k in RANKS)
                fractions = (found[stage].get(f"{part}_fraction") for part in ("encoder", "decoder"))
                cost = "".join("" if fraction is None else f"{fraction:>10.2%}" for fraction in fractions)
                lines.append(f"  {name:<22}{stage:<14}{cells}{cost}")
                name = ""
        lines.append(f"  {'':<22}in shortlist  {found['shortlist_recall']:>7.1%}   (chance R@1 {found['chance']['R@1']:.2%})")
    return "\n".join(lines)


def _has_likelihood(direction: str) -> bool:
    query, target = DIRECTIONS[direction]
    return len(query) == 1 and TEXT in (*query, target)
