"""Base class of the token-level tasks, in which some items of one modality are masked and predicted."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from opt_ds.data.modality import Modality, modalities_of
from opt_ds.data.sample import Sample, given
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import Candidates, TaskCost
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Task


class TokenLevelTask(Task):
    """A task on the masked items of one modality."""

    level = "token"
    modality: ClassVar[int]
    modality_word: ClassVar[str]
    min_items: ClassVar[int] = 1  # minimum number of items of a sample that allows the task

    @property
    def _unit(self) -> Modality:
        return modalities_of(self.config.model)[self.modality]

    def count_masked(self, lengths: np.ndarray) -> np.ndarray:
        """Return how many items are masked for each number of items, int64."""
        return self._unit.count_masked(lengths, self.config.tasks.mask_probability)

    @abstractmethod
    def flops_per_item(self) -> float:
        """Return the multiplications of the head per masked item."""

    def possible(self, candidates: Candidates, derived: Any) -> np.ndarray:
        """Return which samples have at least `min_items` items of the modality."""
        return candidates.lengths[:, self.modality] >= self.min_items

    def disabled(self, present: np.ndarray, stores: list[FeatureStore], derived: Any) -> dict[str, str]:
        """Return a reason if no sample has the modality."""
        return {} if present[:, self.modality].any() else {self.name: f"no sample has {self.modality_word}"}

    def lengths(self, samples: StepSamples) -> np.ndarray:
        """Return the number of items of the modality for each sample of this task, int64 [n]."""
        return samples.input_lengths[self.own(samples), self.modality]

    def num_terms(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of masked items for each loss."""
        count = float(self.count_masked(self.lengths(samples)).sum())
        return dict.fromkeys(self.loss_names(), count)

    def num_samples(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of samples with masked items for each loss."""
        return dict.fromkeys(self.loss_names(), float((self.count_masked(self.lengths(samples)) > 0).sum()))

    def add_cost(self, samples: StepSamples, positions: np.ndarray, total: TaskCost) -> None:
        """Add the cost of the masked items."""
        own, masked = self.own(samples), self.count_masked(self.lengths(samples))
        total.output_positions[own] += masked
        total.head_flops[own] += 2.0 * (masked * self.flops_per_item())


def masked_places(samples: Sequence[Sample], name: str, modality: int) -> list[tuple[int, np.ndarray]]:
    """Return the positions of masked items of a modality for each sample with targets of this task.

    Each entry is (index of the sample in the batch, int64 positions).
    """
    return [(i, np.flatnonzero(given(sample.of(modality).masked))) for i, sample in enumerate(samples) if name in sample.targets]
