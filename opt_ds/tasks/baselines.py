"""Trivial baselines: the loss of a model that ignores the inputs. A useful validation loss must be below it.

Each task defines the prediction of its trivial model (`Task.baseline`) from frequencies and means of the training
split. Frequencies are smoothed by adding one half, so that an unseen item has a finite loss.
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

_TRAIN_ROWS = 20_000  # maximum number of training rows that the frequencies are counted over


class Baseline(ABC):
    """Losses of a trivial model over the validation samples."""

    @abstractmethod
    def add(self, sample: Sample, number: int) -> None:
        """Add a sample of the store with index `number`, whichever task it was assigned to."""

    @abstractmethod
    def losses(self) -> dict[str, float]:
        """Return loss -> its mean over the terms of all samples. Losses without terms are omitted."""


class SampleBaseline(Baseline):
    """A trivial model whose losses are computed sample by sample."""

    def __init__(self, task: str, losses: Callable[[Sample, int], dict[str, np.ndarray]]) -> None:
        """Create the baseline of a task.

        `losses` takes a sample with targets of the task and the index of its store, and returns loss -> float64
        [terms].
        """
        self._task, self._losses = task, losses
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, sample: Sample, number: int) -> None:
        """Add the losses of a sample that has targets of the task."""
        if self._task not in sample.targets:
            return
        for loss, values in self._losses(sample, number).items():
            self._sums[loss] = self._sums.get(loss, 0.0) + float(np.sum(values))
            self._counts[loss] = self._counts.get(loss, 0) + len(values)

    def losses(self) -> dict[str, float]:
        """Return the mean of each loss over the terms added so far."""
        return {loss: total / self._counts[loss] for loss, total in self._sums.items()}


def trivial_baselines(config: Config, stores: list[FeatureStore], version: int | None = None) -> dict[str, float]:
    """Return loss -> mean validation loss of its trivial baseline, over exactly the terms of the validation pass."""
    plan, reader = make_plan(config, stores, version), SampleReader(config, stores)
    statistics = TrainingStatistics(config, stores)
    found = [unit(config).baseline(statistics) for unit in config.tasks.units.values()]
    baselines = [baseline for baseline in found if baseline is not None]
    for step_plan in plan.validation(1, config.train.validate_samples):
        for index in range(step_plan.num_samples):
            sample = reader.read(step_plan.samples, index)
            for baseline in baselines:
                baseline.add(sample, int(step_plan.samples.store[index]))
    losses = {loss: value for baseline in baselines for loss, value in baseline.losses().items()}
    return {loss: losses[loss] for loss in config.tasks.active_losses if loss in losses}


class TrainingStatistics:
    """Statistics of the training split: negative log frequencies, and mean vectors."""

    def __init__(self, config: Config, stores: list[FeatureStore]) -> None:
        self._config, self._stores = config, stores
        self._statistics = [store.description.statistics for store in stores]

    @cached_property
    def tokens(self) -> np.ndarray:
        """Negative log frequency of each token, float64 [vocabulary]."""
        return _negative_log(self._counts[0])

    @cached_property
    def tokens_with_end(self) -> np.ndarray:
        """Negative log frequency of each token and of the end of a text (index −1), float64 [vocabulary + 1]."""
        return _negative_log(np.append(self._counts[0], self._counts[1]))

    @cached_property
    def classes(self) -> np.ndarray:
        """Negative log frequency of each region class, float64 [classes]."""
        return _negative_log(self._counts[2])

    @cached_property
    def codes(self) -> np.ndarray:
        """Negative log frequency of each image code, float64 [image codes]."""
        return _negative_log(self._counts[3])

    @cached_property
    def _counts(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """Counts of each token, of texts, of each region class and of each image code."""
        model = self._config.model
        tokens, classes = np.zeros(model.vocab_size), np.zeros(max(model.image_num_classes, 1))
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
        """Return the squared error of the training mean, averaged over dimensions.

        It is in the units that the model regresses.

        Args:
            vectors: Stored features [n, repeat · v].
            store: Index of their store.
            name: The modality's name in the store's statistics.
            repeat: Number of stored vectors that are stacked per row.

        Returns:
            float64 [n].
        """
        statistics = self._statistics[store][name]
        mean, std = np.tile(statistics.mean, repeat), np.tile(statistics.std, repeat)
        error = vectors.astype(np.float64) - mean
        if self._config.model.standardize_features:
            error = np.clip(error / np.where(std > 1e-4, std, 1.0), -STANDARD_LIMIT, STANDARD_LIMIT)
        return np.square(error).mean(-1)

    def mean_of_labelled(self, targets: Callable[[FeatureStore, int], np.ndarray]) -> np.ndarray:
        """Return the smoothed mean of `targets` over the training samples that have labels, float64 [names]."""
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
