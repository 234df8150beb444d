"""Trivial baselines: the loss of a model that only counts. A useful validation loss must be below it.

Each task defines the prediction of its trivial model (`Task.baseline`) from counts and means of the training split: of an
item's nearest context, such as the neighbouring tokens, codes, regions or frames. Frequencies alone would be too easy to
beat, because a model that only copies neighbours beats them too. Counts are smoothed, so that an unseen item has a finite
loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from opt_ds.config import STANDARD_LIMIT, Config
from opt_ds.data.finetune_plan import make_plan
from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.data.samples import SampleReader
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.context_counts import (
    Chains,
    ContextCounts,
    class_contexts,
    code_contexts,
    code_positions,
    joined_chains,
    neighbour_contexts,
    token_contexts,
)

_TRAIN_ROWS = 20_000  # maximum number of training rows that are counted
_SHRUNK_ROWS = 300  # training rows that a shrinkage is fitted to


class Terms(NamedTuple):
    """A trivial model's losses, float64 [terms], and the probabilities that its predictions are correct, [terms]."""

    losses: np.ndarray
    correct: np.ndarray


class Baseline(ABC):
    """Losses of a trivial model over the validation samples."""

    @abstractmethod
    def add(self, sample: Sample, number: int) -> None:
        """Add a sample of the store with index `number`, whichever task it was assigned to."""

    @abstractmethod
    def losses(self) -> dict[str, float]:
        """Return loss -> its mean over the terms of all samples. Losses without terms are omitted."""

    def accuracies(self) -> dict[str, float]:
        """Return loss -> the accuracy of the trivial model, where the task classifies."""
        return {}


class SampleBaseline(Baseline):
    """A trivial model whose losses are computed sample by sample."""

    def __init__(self, task: str, losses: Callable[[Sample, int], Mapping[str, np.ndarray | Terms]]) -> None:
        """Create the baseline of a task.

        `losses` takes a sample with targets of the task and the index of its store, and returns loss -> its terms:
        float64 [terms], or `Terms` where the task classifies.
        """
        self._task, self._losses = task, losses
        self._sums: dict[str, float] = {}
        self._correct: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, sample: Sample, number: int) -> None:
        """Add the losses of a sample that has targets of the task."""
        if self._task not in sample.targets:
            return
        for loss, found in self._losses(sample, number).items():
            values = found
            if isinstance(found, Terms):
                values = found.losses
                self._correct[loss] = self._correct.get(loss, 0.0) + float(np.sum(found.correct))
            self._sums[loss] = self._sums.get(loss, 0.0) + float(np.sum(values))
            self._counts[loss] = self._counts.get(loss, 0) + len(values)

    def losses(self) -> dict[str, float]:
        """Return the mean of each loss over the terms added so far."""
        return {loss: total / self._counts[loss] for loss, total in self._sums.items() if self._counts[loss]}

    def accuracies(self) -> dict[str, float]:
        """Return the accuracy over the terms added so far."""
        return {loss: total / self._counts[loss] for loss, total in self._correct.items() if self._counts[loss]}


class BaselineResult(NamedTuple):
    """Loss -> mean validation loss of its trivial baseline; and its accuracy, where the task classifies."""

    losses: dict[str, float]
    accuracies: dict[str, float]


def trivial_baselines(config: Config, stores: list[FeatureStore], version: int | None = None) -> dict[str, float]:
    """Return loss -> mean validation loss of its trivial baseline, over exactly the terms of the validation pass."""
    return baseline_result(config, stores, version).losses


def baseline_result(config: Config, stores: list[FeatureStore], version: int | None = None) -> BaselineResult:
    """Return losses and accuracies of the trivial baselines, over exactly the terms of the validation pass."""
    plan, reader = make_plan(config, stores, version), SampleReader(config, stores)
    statistics = TrainingStatistics(config, stores)
    found = [unit(config).baseline(statistics) for unit in config.tasks.units.values()]
    baselines = [baseline for baseline in found if baseline is not None]
    for step_plan in plan.validation(1, config.train.validate_samples):
        for index in range(len(step_plan.samples)):
            sample = reader.read(step_plan.samples, index)
            for baseline in baselines:
                baseline.add(sample, int(step_plan.samples.store[index]))

    def of_all(parts: Iterable[dict[str, float]]) -> dict[str, float]:
        values = {loss: value for part in parts for loss, value in part.items()}
        return {loss: values[loss] for loss in config.tasks.active_losses if loss in values}

    return BaselineResult(of_all(part.losses() for part in baselines), of_all(part.accuracies() for part in baselines))


class TrainingStatistics:
    """Statistics of the training split: counts in context, and mean vectors."""

    def __init__(self, config: Config, stores: list[FeatureStore]) -> None:
        self._config, self._stores = config, stores
        self._statistics = [store.description.statistics for store in stores]
        self._shrinkages: dict[tuple, float] = {}

    def masked_token_terms(self, visible: np.ndarray, places: np.ndarray, tokens: np.ndarray) -> Terms:
        """Return the terms of predicting the tokens at `places` of a text from the visible tokens next to them."""
        return _terms(self._masked_tokens, neighbour_contexts(visible, places, self._vocabulary), tokens)

    def next_token_terms(self, tokens: np.ndarray, ends: bool) -> Terms:
        """Return the terms of predicting each token of a text, and its end, from the two tokens before it."""
        text = np.append(tokens, self._vocabulary) if ends else tokens
        return _terms(self._next_tokens, token_contexts(text, self._vocabulary + 1), text)

    def class_terms(self, labels: np.ndarray, masked: np.ndarray) -> Terms:
        """Return the terms of predicting masked regions' classes from the most frequent visible class and the place."""
        contexts = class_contexts(labels, masked, self._config.model.image_num_classes)
        return _terms(self._classes, contexts, labels[masked])

    def code_terms(self, codes: np.ndarray) -> Terms:
        """Return the terms of predicting each image code from its position and the codes to the left and above."""
        return _terms(self.codes_in_context, code_contexts(codes[None], self._codebook), codes)

    @cached_property
    def code_frequencies(self) -> ContextCounts:
        """Counts of image codes."""
        return ContextCounts([[]], self._code_maps.reshape(-1), self._codebook)

    @cached_property
    def codes_by_position(self) -> ContextCounts:
        """Counts of image codes by position (see `code_positions`)."""
        return ContextCounts(code_positions(self._code_maps), self._code_maps.reshape(-1), self._codebook)

    @cached_property
    def codes_in_context(self) -> ContextCounts:
        """Counts of image codes by position, left code and code above (see `code_contexts`)."""
        contexts = code_contexts(self._code_maps, self._codebook)
        return ContextCounts(contexts, self._code_maps.reshape(-1), self._codebook)

    @cached_property
    def _masked_tokens(self) -> ContextCounts:
        size = self._vocabulary
        chains = [neighbour_contexts(text, np.arange(len(text)), size) for text in self._texts]
        return ContextCounts(joined_chains(chains, (2, 2)), _joined(self._texts), size)

    @cached_property
    def _next_tokens(self) -> ContextCounts:
        size = self._vocabulary + 1
        texts = [np.append(text, self._vocabulary) for text in self._texts]
        return ContextCounts(joined_chains([token_contexts(text, size) for text in texts], (2, 1)), _joined(texts), size)

    @cached_property
    def _classes(self) -> ContextCounts:
        size = self._config.model.image_num_classes
        labels, chains = [], []
        for store, rows in self._train_rows:
            for row in np.unique(rows[rows[:, IMAGE] >= 0, IMAGE]):
                labels.append(store.regions(row).labels[: self._config.model.max_regions].astype(np.int64))
                chains.append(class_contexts(labels[-1], None, size))
        return ContextCounts(joined_chains(chains, (1, 1)), _joined(labels), size)

    @cached_property
    def _texts(self) -> list[np.ndarray]:
        longest = self._config.model.max_text_tokens
        return [
            store.text(row)[:longest].astype(np.int64)
            for store, rows in self._train_rows
            for row in rows[rows[:, TEXT] >= 0, TEXT]
        ]

    @cached_property
    def _code_maps(self) -> np.ndarray:
        """Image codes of the training images, int64 [images, codes per image]."""
        found = [
            store.codes(row)
            for store, rows in self._train_rows if store.has_codes
            for row in np.unique(rows[rows[:, IMAGE] >= 0, IMAGE])
        ]  # fmt: skip
        return np.stack(found).astype(np.int64) if found else np.empty((0, self._config.model.num_image_codes), np.int64)

    @cached_property
    def _train_rows(self) -> list[tuple[FeatureStore, np.ndarray]]:
        """Each store with the rows of a seeded choice of its training samples, int64 [samples, M]."""
        chosen = []
        for store in self._stores:
            samples = store.split_samples(self._config.data.train_split)
            chosen.append((store, store.rows[np.sort(np.random.default_rng(0).permutation(samples)[:_TRAIN_ROWS])]))
        return chosen

    @property
    def _vocabulary(self) -> int:
        return self._config.model.vocab_size

    @property
    def _codebook(self) -> int:
        return self._config.model.image_codebook_size

    def standard(self, vectors: np.ndarray, store: int, name: str, repeat: int) -> np.ndarray:
        """Return vectors relative to the training mean, in the units that the model regresses.

        Args:
            vectors: Stored features [n, repeat · v].
            store: Index of their store.
            name: The modality's name in the store's statistics.
            repeat: Number of stored vectors that are stacked per row.

        Returns:
            float64 [n, repeat · v].
        """
        statistics = self._statistics[store][name]
        mean, std = np.tile(statistics.mean, repeat), np.tile(statistics.std, repeat)
        error = vectors.astype(np.float64) - mean
        if self._config.model.standardize_features:
            error = np.clip(error / np.where(std > 1e-4, std, 1.0), -STANDARD_LIMIT, STANDARD_LIMIT)
        return error

    def mean_error(self, vectors: np.ndarray, store: int, name: str, repeat: int) -> np.ndarray:
        """Return the squared error of the training mean, averaged over dimensions, float64 [n]. See `standard`."""
        return np.square(self.standard(vectors, store, name, repeat)).mean(-1)

    def shrinkage(self, store: int, modality: int, name: str, repeat: int, guess: Callable[[np.ndarray], np.ndarray]) -> float:
        """Return the factor (0 … 1) by which a guess of vectors from others of their sample predicts them best.

        Args:
            store: Index of the store.
            modality: The modality.
            name: Its name in the store's statistics.
            repeat: Number of stored vectors that are stacked per row.
            guess: Returns guesses of a sample's vectors [n, v], each from the other ones.

        Returns:
            The factor of least squares over some training samples.
        """
        key = (store, modality, guess)
        if key not in self._shrinkages:
            reader, products, squares = SampleReader(self._config, self._stores), 0.0, 0.0
            samples = self._stores[store].split_samples(self._config.data.train_split)
            samples = samples[self._stores[store].rows[samples, modality] >= 0]
            for index in np.random.default_rng(0).permutation(samples)[:_SHRUNK_ROWS]:
                sample = reader.read_unmasked(store, int(index), (modality,))
                vectors = self.standard(sample.of(modality).features, store, name, repeat)
                guesses = guess(vectors)
                products, squares = products + float((vectors * guesses).sum()), squares + float((guesses**2).sum())
            self._shrinkages[key] = min(max(products / squares, 0.0), 1.0) if squares else 0.0
        return self._shrinkages[key]

    def mean_of_labelled(self, targets: Callable[[FeatureStore, int], np.ndarray]) -> np.ndarray:
        """Return the smoothed mean of `targets` over the training samples that have labels, float64 [names]."""
        total, count = np.zeros(()), 0
        for store in self._stores:
            for index in store.split_samples(self._config.data.train_split)[:_TRAIN_ROWS]:
                if store.labels(int(index)):
                    total = total + targets(store, int(index))
                    count += 1
        return (total + 0.5) / (count + 1)


def _terms(counts: ContextCounts, contexts: Chains, symbols: np.ndarray) -> Terms:
    losses = -np.log(counts.probabilities(contexts, symbols))
    return Terms(losses, (counts.most_likely(contexts, len(symbols)) == symbols).astype(np.float64))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
