"""Hard negatives: how often the true caption is preferred to one that differs from it in one thing.

The captions of a sample are scored given its image, or its audio: by the text decoder's likelihood and by the matching
head. Equal scores count half, so a score that cannot tell the captions apart gives 50 %. Beside the fractions stand
those with another sample's image or audio and, of the text decoder, those without any input. Beside them stand those of
an untrained model of the same shape, and of a bag of words that is fitted to training data: it has 50 % wherever a
negative has the words of the true caption.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from opt_ds.data.modalities import TEXT
from opt_ds.data.sample import Sample
from opt_ds.evaluation.bag_of_words import BagOfWords
from opt_ds.evaluation.controls import another, other_samples, with_others
from opt_ds.evaluation.evaluator import Evaluator, seeded_choice
from opt_ds.evaluation.figures import Measured, beside, measure
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.retrieval import label_of
from opt_ds.features.text import TextExtractor
from opt_ds.scenes.negatives import NEGATIVES
from opt_ds.scenes.records import SceneRecord

LIKELIHOOD_SCORE, MATCHING_SCORE = "likelihood", "matching"
#: Key of the fraction over the negatives of all kinds.
ALL_KINDS = "all"

#: Returns the scores of each sample's texts.
_Scorer = Callable[[Sequence[Sample], Sequence[list[np.ndarray]]], list[np.ndarray]]


class Baselines(NamedTuple):
    """What scores the captions besides the model: an untrained model of the same shape, and a bag of words if there is one.
    """

    untrained: Evaluator
    bag_of_words: BagOfWords | None


def negative_figures(
    evaluator: Evaluator,
    split: str,
    records: Mapping[int, SceneRecord],
    modality: int,
    scores: Sequence[str],
    baselines: Baselines,
    limit: int | None,
    seed: int,
) -> dict[str, Any]:
    """Return score -> figures: for each kind of negative, the fraction of them that the true caption is preferred to.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        records: Sample index -> truth.
        modality: The modality that is given.
        scores: LIKELIHOOD_SCORE, MATCHING_SCORE or both.
        baselines: Other scorers of the same captions.
        limit: Maximum number of samples. None: all.
        seed: Seed of the choice of samples and of the other samples.
    """
    gallery = evaluator.samples_with(split, (TEXT, modality))
    gallery = np.array([index for index in gallery if records[int(index)].negatives], dtype=np.int64)
    gallery = seeded_choice(gallery, limit, seed)
    kinds = [list(records[int(index)].negatives) for index in gallery]
    texts = _tokens(evaluator, [records[int(index)] for index in gallery])
    samples = [evaluator.read(index, (modality,)) for index in gallery]
    others = other_samples(evaluator, gallery, (modality,), seed)
    swapped = with_others(evaluator, gallery, (modality,), modality, others)

    def preferred(score: _Scorer, inputs: list[Sample], places: Sequence[int]) -> dict[str, np.ndarray]:
        own = [texts[place] for place in places]
        return preferences(score(inputs, own), own, [kinds[place] for place in places])

    everywhere, rows = range(len(gallery)), {}
    bag = baselines.bag_of_words
    by_words = preferred(bag.scores, samples, everywhere) if bag is not None else None
    for name in scores:
        scorer, untrained = (
            _likelihoods(model) if name == LIKELIHOOD_SCORE else _matches(model, modality)
            for model in (evaluator, baselines.untrained)
        )
        parts: dict[str, tuple[dict[str, np.ndarray], Any]] = {}
        if len(others.places):
            parts[another(modality)] = preferred(scorer, swapped, others.places.tolist()), others.places
        if name == LIKELIHOOD_SCORE:
            parts["no_input"] = preferred(scorer, [Sample() for _ in gallery], everywhere), None
        parts["untrained_model"] = preferred(untrained, samples, everywhere), None
        if by_words is not None:
            parts["bag_of_words"] = by_words, None
        rows[name] = _row(preferred(scorer, samples, everywhere), parts) | {"samples": len(gallery)}
    return rows | {"indistinguishable": sum(np.array_equal(own[0], text) for own in texts for text in own[1:])}


def _row(own: Mapping[str, np.ndarray], parts: Mapping[str, tuple[Mapping[str, np.ndarray], Any]]) -> dict[str, Any]:
    """Return the figures of the kinds that occur, and the number of pairs of each."""
    figures, pairs = {}, {}
    for kind in (kind for kind, counts in own.items() if counts[:, 1].any()):
        controls: dict[str, Measured | float] = {"chance": 0.5}
        for name, (other, places) in parts.items():
            if other[kind][:, 1].any():
                controls[name] = Measured(Measurement(other[kind]), places)
        figures[kind] = measure(Measurement(own[kind]), controls)
        pairs[kind] = int(own[kind][:, 1].sum())
    return {**beside(figures), "pairs": pairs}


def preferences(
    scores: Sequence[np.ndarray], texts: Sequence[list[np.ndarray]], kinds: Sequence[list[str]]
) -> dict[str, np.ndarray]:
    """Return kind -> the number of negatives that the true caption is preferred to, and their number, float64 [n, 2].

    Equal scores, or texts of the same tokens, count half. NaN is no preference for the true caption.

    Args:
        scores: The scores of each sample's texts, the true caption first.
        texts: The tokens of these texts.
        kinds: The kinds of each sample's negatives.
    """
    parts = {kind: np.zeros((len(scores), 2)) for kind in (ALL_KINDS, *NEGATIVES)}
    for row, (own, tokens, names) in enumerate(zip(scores, texts, kinds, strict=True)):
        for value, negative, name in zip(own[1:], tokens[1:], names, strict=True):
            tied = own[0] == value or np.array_equal(tokens[0], negative)
            won = 0.5 if tied else float(own[0] > value)
            parts[name][row] += won, 1
            parts[ALL_KINDS][row] += won, 1
    return parts


def _tokens(evaluator: Evaluator, records: Sequence[SceneRecord]) -> list[list[np.ndarray]]:
    """Return the tokens of each sample's first caption and of its negatives, int64, as far as the model reads them."""
    store, longest = evaluator.store, evaluator.config.model.max_text_tokens
    form = store.description.extractors["text"].get("unicode_form", "none")
    extractor = TextExtractor(store.tokenizer_folder, form)
    return [
        [ids[:longest].astype(np.int64) for ids in extractor.extract([record.captions[0], *record.negatives.values()])]
        for record in records
    ]


def _likelihoods(evaluator: Evaluator) -> _Scorer:
    """Return the scorer by the text decoder's log likelihood."""

    def score(samples: Sequence[Sample], texts: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
        numbers = _by_sample(np.arange(sum(map(len, texts))), texts)
        return evaluator.text_log_likelihood_of(samples, list(chain(*texts)), numbers)

    return score


def _matches(evaluator: Evaluator, modality: int) -> _Scorer:
    """Return the scorer by the matching head's label of a text that matches the modality."""
    text = evaluator.reader.modalities[TEXT]

    def score(samples: Sequence[Sample], texts: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
        pairs = [
            replace(sample, items={TEXT: text.items_of(ids), **sample.items})
            for sample, own in zip(samples, texts, strict=True) for ids in own
        ]  # fmt: skip
        return _by_sample(evaluator.matching_scores(pairs)[:, label_of((TEXT,), modality)], texts)

    return score


def _by_sample(values: np.ndarray, texts: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
    """Return the values of all texts as one array per sample."""
    return np.split(values, np.cumsum([len(own) for own in texts])[:-1]) if len(texts) else []
