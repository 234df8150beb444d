"""Recall of ranked candidates, with ties at chance, and the order of texts by likelihood and prior.

Legend: q queries, c candidates, k ranks or shortlisted candidates.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from opt_ds.evaluation.figures import Figure, Measured, beside, measure
from opt_ds.evaluation.intervals import Measurement

RANKS = (1, 5, 10)
#: Number of likeliest texts per query whose likelihood is divided by their prior (re-ranking of the N best: Li et al.
#: 2016). The prior of a text that no training input explains is close to 0, so that text would otherwise win for every
#: query.
LIKELIEST = 50


def hits(scores: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Return the probability that a correct candidate is among the k best, float64 [q, ranks].

    Candidates of equal score are in random order: with r correct and w wrong ones at the best correct score, and h
    wrong ones above it, a hit has the probability 1 − C(w, k − h) / C(w + r, k − h). So constant scores give chance,
    whatever the order of the candidates. NaN counts as the lowest score, and a correct candidate of NaN is no hit.

    Args:
        scores: float [q, c].
        same: Which candidates are correct, bool [q, c].
    """
    known = ~np.isnan(scores)
    ranked = np.where(known, scores, -np.inf)
    right = same & known
    best_q1 = np.where(right, ranked, -np.inf).max(1, keepdims=True)
    above_q = ((ranked > best_q1) & ~same & known).sum(1)
    tied = (ranked == best_q1) & known
    tied_right_q, tied_wrong_q = (tied & same).sum(1), (tied & ~same).sum(1)
    found = [_any_among(k - above_q, tied_right_q, tied_wrong_q) for k in RANKS]
    return np.stack(found, axis=1) * right.any(1)[:, None]


def _any_among(taken_q: np.ndarray, right_q: np.ndarray, wrong_q: np.ndarray) -> np.ndarray:
    """Return the probability that `taken` of `right + wrong` items in random order have a right one, float64 [q]."""
    miss_q = np.ones(len(taken_q))
    for step in range(int(taken_q.max(initial=0))):
        left_q = np.maximum(right_q + wrong_q - step, 1)
        miss_q = np.where(step < taken_q, miss_q * np.maximum(wrong_q - step, 0) / left_q, miss_q)
    return 1 - miss_q


def recall(scores: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """Return the mean of `hits` over the queries, by "R@k"."""
    return dict(zip(_NAMES, map(float, hits(scores, same).mean(0)), strict=True))


def chance(same: np.ndarray) -> dict[str, float]:
    """Return the exact recall of a random order, which is that of constant scores."""
    return recall(np.zeros(same.shape), same)


def chance_among(same: np.ndarray, k: int) -> np.ndarray:
    """Return the probability that one of k random candidates is correct, float64 [q]. `same` is bool [q, c]."""
    return _any_among(np.full(len(same), k), same.sum(1), (~same).sum(1))


_NAMES = tuple(f"R@{k}" for k in RANKS)


def recall_figures(
    scores: np.ndarray, same: np.ndarray, controls: Mapping[str, np.ndarray] | None = None, places: np.ndarray | None = None
) -> dict[str, Figure]:
    """Return R@k beside chance and beside the recall of other scores of the same pairs.

    Args:
        scores: float [q, c].
        same: Which candidates are correct, bool [q, c].
        controls: Name -> scores [q, c].
        places: Queries that the controls, except chance, are compared on. None: all.
    """
    own, by_chance = hits(scores, same), hits(np.zeros(same.shape), same)
    others = {name: hits(other, same) for name, other in (controls or {}).items()}
    found = {}
    for k, name in enumerate(_NAMES):
        measured = {"chance": Measured(Measurement.mean(by_chance[:, k]))}
        for key, other in others.items():
            measurement = Measurement.mean(other[:, k])
            measured[key] = Measured(measurement if places is None else measurement.at(places), places)
        found[name] = measure(Measurement.mean(own[:, k]), measured)
    return found


def recall_row(
    scores: np.ndarray, same: np.ndarray, controls: Mapping[str, np.ndarray] | None = None, **facts: Any
) -> dict[str, Any]:
    """Return `recall_figures` as a row of JSON, with the size of the gallery, chance and further facts."""
    return {"candidates": scores.shape[1], **facts, **beside(recall_figures(scores, same, controls)), "chance": chance(same)}


def likeliest(log_likelihood_qk: np.ndarray) -> np.ndarray:
    """Return which texts are among the `LIKELIEST` of each query, bool [q, k]."""
    count = min(LIKELIEST, log_likelihood_qk.shape[1])
    likely_qk = np.zeros(log_likelihood_qk.shape, dtype=bool)
    np.put_along_axis(likely_qk, np.argpartition(-log_likelihood_qk, count - 1, axis=1)[:, :count], True, axis=1)
    return likely_qk


def likeliest_first(log_likelihood_qk: np.ndarray, over_prior_qk: np.ndarray, likely_qk: np.ndarray) -> np.ndarray:
    """Return scores [q, k]: the likeliest texts by likelihood over prior, then the other texts by likelihood."""
    least_q = np.where(likely_qk, over_prior_qk, np.inf).min(1, keepdims=True)
    return np.where(likely_qk, over_prior_qk, least_q + log_likelihood_qk - log_likelihood_qk.max(1, keepdims=True) - 1)


def shortlisted(first_qc: np.ndarray, shortlist: int) -> np.ndarray:
    """Return the gallery indices of the best candidates in ascending order, int64 [q, k].

    Of candidates with equal scores, a seeded random choice is taken. The first ones could be the correct ones.
    """
    order_qc = np.random.default_rng(0).permuted(np.tile(np.arange(first_qc.shape[1]), (len(first_qc), 1)), axis=1)
    shuffled_qc = np.take_along_axis(first_qc, order_qc, axis=1)
    best_qk = np.argpartition(-shuffled_qc, shortlist - 1, axis=1)[:, :shortlist]
    return np.sort(np.take_along_axis(order_qc, best_qk, axis=1), axis=1)


def reranked(first_qc: np.ndarray, best_qk: np.ndarray, second_qk: np.ndarray) -> np.ndarray:
    """Return scores [q, c] that rank the shortlist first, in the second stage's order.

    The other candidates follow in the first stage's order.
    """
    scores_qc = first_qc.astype(np.float64) - first_qc.max(1, keepdims=True)
    np.put_along_axis(scores_qc, best_qk, second_qk - second_qk.min(1, keepdims=True) + 1, axis=1)
    return scores_qc


def log_mean_exp(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the log of the mean of exp(values) along the axis, which is kept with length 1."""
    return torch.logsumexp(torch.from_numpy(values), axis, keepdim=True).numpy() - np.log(values.shape[axis])
