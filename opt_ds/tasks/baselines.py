"""The loss that each task has without learning anything: what a validation loss must fall below to mean something.

A task says itself what its trivial model predicts (`Task.baseline`), from frequencies and means of the training split.
Frequencies are smoothed by one half, so that an unseen item has a finite loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import numpy as np

from opt_ds.config import STANDARD_LIMIT, Config
from opt_ds.data.finetune_plan import make_plan
from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.data.samples import SampleReader
from opt_ds.store.reader import FeatureStore

_TRAIN_ROWS = 20_000  # training rows that the frequencies are counted over, at most


class Baseline(ABC):
    """A trivial model's losses, over the samples of the validation."""

    @abstractmethod
    def add(self, sample: Sample, number: int) -> None:
        """Count a sample of store `number`, whichever task it has."""

    @abstractmethod
    def losses(self) -> dict[str, float]:
        """Return loss -> its mean over the terms of all samples; only losses that have a term."""


class SampleBaseline(Baseline):
    """A trivial model whose losses are those of the samples one by one."""

    def __init__(self, task: str, losses: Callable[[Sample, int], dict[str, np.ndarray]]) -> None:
        """`losses`: of a sample with targets of the task, and the number of its store: loss -> float64 [terms]."""
        self._task, self._losses = task, losses
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, sample: Sample, number: int) -> None:
        if self._task not in sample.targets:
            return
        for loss, values in self._losses(sample, number).items():
            self._sums[loss] = self._sums.get(loss, 0.0) + float(np.sum(values))
            self._counts[loss] = self._counts.get(loss, 0) + len(values)

    def losses(self) -> dict[str, float]:
        return {loss: total / self._counts[loss] for loss, total in self._sums.items()}


def trivial_baselines(config: Config, stores: list[FeatureStore], version: int | None = None) -> dict[str, float]:
    """Loss -> mean validation loss of its trivial baseline, over exactly the terms of the plan's validation pass."""
    plan, reader = make_plan(config, stores, version), SampleReader(config, stores)
    statistics = TrainingStatistics(config, stores)
    found = [unit(config).baseline(statistics) for unit in config.tasks.units.values()]
    baselines = [baseline for baseline in found if baseline is not None]
    for planned in plan.validation(1, config.train.validate_samples):
        for slot in range(planned.num_samples):
            sample = reader.read(planned.samples, slot)
            for baseline in baselines:
                baseline.add(sample, int(planned.samples.store[slot]))
    losses = {loss: value for baseline in baselines for loss, value in baseline.losses().items()}
    return {loss: losses[loss] for loss in config.tasks.active_losses if loss in losses}


class TrainingStatistics:
    """Negative log-frequencies of the training split, and the mean vectors."""

    def __init__(self, config: Config, stores: list[FeatureStore]) -> None:
        self._config, self._stores = config, stores
        self._statistics = [store.description.statistics for store in stores]

    @cached_property
    def tokens(self) -> np.ndarray:
        """float64 [vocabulary]"""
        return _negative_log(self._counts[0])

    @cached_property
    def tokens_with_end(self) -> np.ndarray:
        """float64 [vocabulary + 1]; the text's end is the last entry: index −1."""
        return _negative_log(np.append(self._counts[0], self._counts[1]))

    @cached_property
    def classes(self) -> np.ndarray:
        """float64 [classes of regions]"""
        return _negative_log(self._counts[2])

    @cached_property
    def codes(self) -> np.ndarray:
        """float64 [image codes]"""
        return _negative_log(self._counts[3])

    @cached_property
    def _counts(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """How often each token, a text, each class and each image code occurs."""
        model = self._config.model
        tokens, classes = np.zeros(model.vocab_size), np.zeros(model.image_num_classes)
        codes, num_texts = np.zeros(model.image_codebook_size), 0
        for store in self._stores:
            rows = store.rows[store.split_samples(self._config.data.train_split)[:_TRAIN_ROWS]]
            for row in rows[rows[:, TEXT] >= 0, TEXT]:
                np.add.at(tokens, store.text(row)[: model.max_text_tokens], 1)
                num_texts += 1
            for row in np.unique(rows[rows[:, IMAGE] >= 0, IMAGE]):
                np.add.at(classes, store.regions(row).labels[: model.max_regions], 1)
                if store.has_codes:
                    np.add.at(codes, store.codes(row), 1)
        return tokens, num_texts, classes, codes

    def mean_error(self, vectors: np.ndarray, store: int, name: str, repeat: int) -> np.ndarray:
        """float64 [n]: squared error of the training mean, averaged over dimensions, in the units that the model regresses.

        Args:
            vectors: [n, repeat · v] stored features.
            store: The number of their store.
            name: The modality's name in the store's statistics.
            repeat: How many stored vectors are side by side.
        """
        statistics = self._statistics[store][name]
        mean, std = np.tile(statistics.mean, repeat), np.tile(statistics.std, repeat)
        error = vectors.astype(np.float64) - mean
        if self._config.model.standardize_features:
            error = np.clip(error / np.where(std > 1e-4, std, 1.0), -STANDARD_LIMIT, STANDARD_LIMIT)
        return np.square(error).mean(-1)

    def mean_of_labelled(self, targets: Callable[[FeatureStore, int], np.ndarray]) -> np.ndarray:
        """float64 [names], the mean of these targets over the training samples that have labels."""
        total, count = np.zeros(()), 0
        for store in self._stores:
            for index in store.split_samples(self._config.data.train_split)[:_TRAIN_ROWS]:
                if store.labels(int(index)):
                    total = total + targets(store, int(index))
                    count += 1
        return (total + 0.5) / (count + 1)


def _negative_log(counts: np.ndarray) -> np.ndarray:
    smoothed = counts + 0.5
    return -np.log(smoothed / smoothed.sum())
