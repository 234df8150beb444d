"""A task of another package: how many regions an image has, from [CLS]. The image is never dropped, and nothing is masked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from opt_ds.config import LossConfig, ModelConfig, TasksConfig
from opt_ds.data.layout import Layout, as_long
from opt_ds.data.modalities import IMAGE
from opt_ds.data.sample import Sample, given
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import BatchPart, Candidates, SampledTasks, TaskCost
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Encoded, Loss, LossTerm, Task, classification_term
from opt_ds.tasks.baselines import Baseline, SampleBaseline, TrainingStatistics


class CountingConfig(LossConfig):
    most: int = Field(8, ge=1, description="Largest number of regions. Larger ones count as this many.")


@dataclass
class Counts(BatchPart):
    index: torch.Tensor  # int64 [j], packed positions of [CLS]
    targets: torch.Tensor  # int64 [j]

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        return (self.index,)


class RegionCounting(Task):
    """`sample.targets["counting"]`: int, the number of regions."""

    name = "counting"
    level = "sample"
    options = CountingConfig
    about = "Region counting."
    losses = (Loss("counting", "counting.", about),)
    columns = {"num_regions": (np.int16, -1)}  # noqa: RUF012

    def possible(self, candidates: Candidates, derived: Any) -> np.ndarray:
        return candidates.lengths[:, IMAGE] >= 1

    def disabled(self, present: np.ndarray, stores: list[FeatureStore], derived: Any) -> dict[str, str]:
        return {} if present[:, IMAGE].any() else {self.name: "no sample has image"}

    def assign(self, candidates: Candidates, sampled: SampledTasks, own: np.ndarray, derived: Any) -> None:
        sampled.columns["num_regions"][own] = np.minimum(candidates.lengths[own, IMAGE], self.section.most)

    def num_terms(self, samples: StepSamples) -> dict[str, float]:
        return {"counting": float(len(self.own(samples)))}

    def add_cost(self, samples: StepSamples, positions: np.ndarray, total: TaskCost) -> None:
        own = self.own(samples)
        total.output_positions[own] += 1
        total.head_flops[own] += 2.0 * self.config.model.hidden_size * (self.section.most + 1)

    def add_targets(self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore) -> None:
        assert min(len(given(sample.items[IMAGE].features)), self.section.most) == samples.columns["num_regions"][index]
        sample.targets[self.name] = int(samples.columns["num_regions"][index])

    def collate(self, samples: Sequence[Sample], layout: Layout) -> Counts:
        counted = [i for i, sample in enumerate(samples) if self.name in sample.targets]
        return Counts(as_long(layout.starts[counted]), as_long([samples[i].targets[self.name] for i in counted]))

    @classmethod
    def make_head(cls, model: ModelConfig, tasks: TasksConfig, word: nn.Embedding) -> nn.Module:
        return nn.Linear(model.hidden_size, tasks.counting.most + 1)

    @classmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        assert head is not None and isinstance(part, Counts)
        return {"counting": classification_term(head(encoded.hidden_te.index_select(0, part.index)), part.targets)}

    def baseline(self, statistics: TrainingStatistics) -> Baseline:
        """All numbers alike."""
        alike = np.array([np.log(self.section.most + 1)])
        return SampleBaseline(self.name, lambda sample, number: {"counting": alike})
