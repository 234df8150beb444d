"""Zero-shot retrieval in five directions.

The scores are the matching head's and, if text is one side, the text decoder's likelihood.

A gallery of seeded candidates provides both queries and targets. Equal captions and identical images count as correct:
a hit is any candidate whose target is the same text, image or audio as the query's own. A hit is also any candidate of
the same query, such as each caption of an image.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from opt_ds.abilities import MATCH, WRITE_TEXT
from opt_ds.data.matching import MATCHING_LABELS
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.store.same_content import image_content

#: Direction -> (query modalities, target modality).
DIRECTIONS: dict[str, tuple[tuple[int, ...], int]] = {
    "image_to_text": ((IMAGE,), TEXT),
    "text_to_image": ((TEXT,), IMAGE),
    "text_to_audio": ((TEXT,), AUDIO),
    "audio_to_text": ((AUDIO,), TEXT),
    "text_audio_to_image": ((TEXT, AUDIO), IMAGE),
}
_LABEL_OF_PAIR = {frozenset((IMAGE, AUDIO)): 1, frozenset((TEXT, AUDIO)): 2, frozenset((TEXT, IMAGE)): 3}
RANKS = (1, 5, 10)


def retrieval(
    evaluator: Evaluator,
    split: str,
    candidates: int = 200,
    matching_candidates: int = 100,
    triple_candidates: int = 50,
    seed: int = 1,
) -> dict[str, Any]:
    """Return R@1/5/10 of each direction, with chance, for the scores `likelihood` and `matching`.

    The gallery of a direction consists of samples that have its modalities. A direction without such samples is
    omitted, and so is a score whose loss the model was not trained with. If texts are ranked, a text's likelihood is
    divided by its mean over the queries; otherwise short captions would win.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        candidates: Gallery size for `likelihood`.
        matching_candidates: Gallery size for `matching`, smaller because the matching head must encode every pair.
        triple_candidates: Gallery size for `matching` if a pair consists of three modalities.
        seed: Seed of the galleries.

    Returns:
        Direction -> score -> figures.

    Raises:
        UserError: No direction is left, or the model was trained with neither loss.
    """
    result: dict[str, Any] = {"split": split, "seed": seed}
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
    for direction, (query, target) in DIRECTIONS.items():
        figures: dict[str, Any] = {}
        if len(query) == 1:
            (other,) = {*query, target} - {TEXT}
            if other not in there:
                continue
            if writes:
                by_other = likelihood[other]  # [others, texts]
                scores = by_other - log_mean_exp(by_other, axis=0) if target == TEXT else by_other.T
                figures["likelihood"] = _figures(scores, same_pairs(evaluator, gallery[other], gallery[other], query, target))
            if judges:
                scores = pairs[other].T if target == TEXT else pairs[other]
                figures["matching"] = _figures(scores, same_pairs(evaluator, small[other], small[other], query, target))
        else:
            ranked = evaluator.samples_with(split, (TEXT, IMAGE, AUDIO), triple_candidates, seed)
            if not len(ranked):
                continue
            if judges:
                scores = _matching_matrix(evaluator, ranked, query, target)
                figures["matching"] = _figures(scores, same_pairs(evaluator, ranked, ranked, query, target))
        result[direction] = figures
    return result


def retrieval_lines(figures: dict[str, Any]) -> list[str]:
    """Return the figures of `retrieval` as text, one line per direction and score."""
    lines = ["  retrieval                                            " + "".join(f"{f'R@{k}':>8}" for k in RANKS)]
    for direction in (name for name in DIRECTIONS if name in figures):
        name = direction.replace("_to_", "→").replace("_", "+")
        for score, label in (("likelihood", "text likelihood"), ("matching", "matching head")):
            if score in figures[direction]:
                row = figures[direction][score]
                cells = "".join(f"{row[f'R@{k}']:>8.1%}" for k in RANKS)
                chance = f"   chance {row['chance']['R@1']:.1%}"
                lines.append(f"    {name:<20}{label:<16}of {row['candidates']:<11}{cells}{chance}")
                name = ""
    return lines


def _figures(scores: np.ndarray, same: np.ndarray) -> dict[str, Any]:
    return {"candidates": len(scores), **recall(scores, same), "chance": chance(same)}


def recall(scores: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """Return the fraction of queries with a correct candidate among the k best.

    `scores` and `same` are [queries, candidates].

    The rank of the best correct candidate counts the incorrect ones with a higher score and half of those with the same
    score, so that constant scores give chance. NaN counts as the lowest score.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    best_right = np.where(same, scores, -np.inf).max(1, keepdims=True)
    wrong = ~same
    rank = ((scores > best_right) & wrong).sum(1) + 0.5 * ((scores == best_right) & wrong).sum(1)
    return {f"R@{k}": float((rank < k).mean()) for k in RANKS}


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
    texts = [evaluator.read(index, (TEXT,)).of(TEXT).ids for index in gallery]
    return evaluator.text_log_likelihood(samples, texts)


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


def content_names(evaluator: Evaluator, samples: np.ndarray, modality: int) -> np.ndarray:
    """Return int64 [n] identifiers that are equal if and only if two samples' captions, images or audio are equal."""
    content: list[str] | list[bytes]
    if modality == TEXT:
        content = [evaluator.caption(index) for index in samples]
    else:
        store, rows = evaluator.store, evaluator.store.rows[samples, modality]
        content = [
            image_content(store.region_features(row)) if modality == IMAGE else store.frames(row).tobytes() for row in rows
        ]
    return np.unique(np.array([hash(item) for item in content]), return_inverse=True)[1]


def chance(same: np.ndarray) -> dict[str, float]:
    """Return the exact R@k of a random order: 1 − C(n − correct, k) / C(n, k), averaged over the queries."""
    n, right = same.shape[1], same.sum(1)
    chance = {}
    for k in RANKS:
        miss = np.ones(len(right))
        for i in range(min(k, n)):
            miss = miss * np.maximum(n - right - i, 0) / (n - i)
        chance[f"R@{k}"] = float((1 - miss).mean())
    return chance


def log_mean_exp(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the log of the mean of exp(values) along the axis, which is kept with length 1."""
    return torch.logsumexp(torch.from_numpy(values), axis, keepdim=True).numpy() - np.log(values.shape[axis])
