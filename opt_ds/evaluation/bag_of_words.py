"""Bag of words: a text scored by how well its words, in any order, fit an image or audio.

The frequency of each word is predicted linearly from the mean and standard deviation of the input's features. The score is
the log likelihood of words that are drawn independently. Two texts of the same words have the same score, so what this
baseline reaches needs neither order nor binding.

Legend: n samples, e inputs of the regression, w words of the tokenizer.
"""

from collections.abc import Sequence

import numpy as np

from opt_ds.data.modalities import TEXT
from opt_ds.data.sample import Sample
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.ridge import Ridge, fit_ridge

_FITTED_SAMPLES = 4000
_FEWEST_SAMPLES = 2
_LEAST_COUNT = 1e-3  # of a word in a text: the regression may predict less than nothing
_WIDEST = 1024  # inputs of the regression: more are projected to as many by a fixed random matrix


class BagOfWords:
    """Log frequencies of words, predicted from one modality."""

    def __init__(self, modality: int, words: np.ndarray, regression: Ridge, vocabulary: int) -> None:
        """Keep what `fit_bag_of_words` fitted. `words` are the ids of the predicted words, int64."""
        self.modality, self._words, self._regression, self._vocabulary = modality, words, regression, vocabulary

    def scores(self, samples: Sequence[Sample], texts: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
        """Return the log likelihood of each sample's texts (WordPiece ids), one float64 array per sample."""
        return [
            np.array([float(log_frequencies_w[np.sort(ids)].sum()) for ids in own])
            for log_frequencies_w, own in zip(self._log_frequencies(samples), texts, strict=True)
        ]

    def _log_frequencies(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the log frequency of every word for each sample, float64 [n, w]. They add up to 1 before the log."""
        counts_nw = np.full((len(samples), self._vocabulary), _LEAST_COUNT)
        if len(samples):
            predicted = self._regression.predict(_statistics(samples, self.modality))
            counts_nw[:, self._words] = np.maximum(predicted, _LEAST_COUNT)
        return np.log(counts_nw / counts_nw.sum(1, keepdims=True))


def fit_bag_of_words(evaluator: Evaluator, modality: int, seed: int) -> BagOfWords | None:
    """Fit a bag of words on at most 4,000 training samples. None: there are no two with text and the modality.

    Args:
        evaluator: The model, whose weights do not matter, and the store.
        modality: The modality that words are predicted from: image or audio.
        seed: Seed of the choice of samples.
    """
    store, train_split = evaluator.store, evaluator.config.data.train_split
    if train_split not in store.description.split_names:
        return None
    train = evaluator.samples_with(train_split, (TEXT, modality), _FITTED_SAMPLES, seed)
    if len(train) < _FEWEST_SAMPLES:
        return None
    samples = [evaluator.read(index, (TEXT, modality)) for index in train]
    vocabulary = store.description.dims.vocab_size
    counts_nw = np.stack([np.bincount(sample.of(TEXT).ids, minlength=vocabulary) for sample in samples])
    words = np.flatnonzero(counts_nw.any(0))
    regression = fit_ridge(_statistics(samples, modality), counts_nw[:, words])
    return BagOfWords(modality, words, regression, vocabulary)


def _statistics(samples: Sequence[Sample], modality: int) -> np.ndarray:
    """Return mean and standard deviation of the features of a modality, float64 [n, e]."""
    found = []
    for sample in samples:
        features = sample.of(modality).features.astype(np.float64)
        if not len(features):
            features = np.zeros((1, features.shape[1]))
        found.append(np.concatenate([features.mean(0), features.std(0)]))
    statistics = np.stack(found)
    if statistics.shape[1] <= _WIDEST:
        return statistics
    return statistics @ np.random.default_rng(0).standard_normal((statistics.shape[1], _WIDEST))
