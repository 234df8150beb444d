"""A modality of another package: touch, the readings of a finger's sensors over time. And a task on it.

A run of neighbouring readings is masked, and always the last ones: what comes next is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from opt_ds.config import DataConfig, ModelConfig, Section, TasksConfig
from opt_ds.data.layout import Layout, join
from opt_ds.data.sample import Sample, given
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import BatchPart
from opt_ds.modalities.features import FeatureBatch, FeatureItems, FeatureModality
from opt_ds.nn.transformer import LayerNorm
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import Dims, StoreDescription
from opt_ds.tasks.base import Encoded, Loss, LossTerm
from opt_ds.tasks.baselines import Baseline, SampleBaseline, TrainingStatistics
from opt_ds.tasks.token_level import TokenLevelTask, masked_places

TOUCH = 3  # its number: it follows the built-in modalities


class TouchConfig(Section):
    """Touch."""

    feature_dim: int = Field(4, ge=1, description="Number of sensors.")
    max_readings: int = Field(8, ge=2, description="Largest number of readings. Later ones are dropped.")


@dataclass
class TouchItems(FeatureItems):
    """Readings of one sample."""


@dataclass
class TouchBatch(FeatureBatch):
    positions: torch.Tensor  # int64 [n]
    masked: torch.Tensor  # bool [n]


class Touch(FeatureModality[TouchItems, TouchBatch]):
    name = "touch"
    item_word, row_word = "readings", "touches"
    embedder, standardizer = "touch", "touch_standardizer"
    options, about = TouchConfig, "Touch: readings of a finger's sensors."
    limit_key = "touch.max_readings"

    @property
    def limit(self) -> int:
        return self.model.touch.max_readings

    @property
    def feature_dim(self) -> int:
        return self.model.touch.feature_dim

    @property
    def projected_dim(self) -> int:
        return self.feature_dim

    def stored_bytes(self, dims: Dims) -> int:
        return 2 * self.projected_dim

    def store_sizes(self, store: StoreDescription) -> dict[str, int]:
        return {"touch.feature_dim": store.further["touch"].feature_dim} if "touch" in store.further else {}

    def read(self, store: FeatureStore, row: int, data: DataConfig | None = None, key: int | None = None) -> TouchItems:
        return self.items_of(store.columns("touch", row))

    def items_of(self, features: Any) -> TouchItems:
        return TouchItems(features["features"][: self.limit])

    def count_masked(self, lengths: np.ndarray | int, probability: float) -> np.ndarray:
        return np.ceil(np.asarray(lengths) * probability).astype(np.int64)

    def mask(self, items: TouchItems, store: FeatureStore, probability: float, span: int, key: int) -> None:
        items.masked = np.arange(len(items)) >= len(items) - int(self.count_masked(len(items), probability))

    def collate(self, items: Sequence[TouchItems | None], layout: Layout) -> TouchBatch:
        there = [own for own in items if own is not None]
        return TouchBatch(
            index=torch.from_numpy(layout.index_of(self.number)),
            features=join([own.features for own in there], np.float16, (self.projected_dim,)),
            positions=join([np.arange(len(own)) for own in there], np.int64),
            masked=join([own.is_masked for own in there], bool),
        )

    def make_embedder(self) -> nn.Module:
        return TouchEmbedder(self.model)

    def embed(
        self, embedder: nn.Module, batch: TouchBatch, features: torch.Tensor | None, type_e: torch.Tensor
    ) -> torch.Tensor:
        return embedder(features, batch.positions, batch.masked, type_e)

class TouchEmbedder(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.feature = nn.Linear(model.touch.feature_dim, model.hidden_size)
        self.position = nn.Embedding(model.touch.max_readings, model.hidden_size)
        self.mask = nn.Parameter(torch.zeros(model.hidden_size))
        self.norm = LayerNorm(model)

    def forward(
        self, features: torch.Tensor, positions: torch.Tensor, masked: torch.Tensor, type_e: torch.Tensor
    ) -> torch.Tensor:
        dtype = self.feature.weight.dtype
        hidden = self.feature(features.masked_fill(masked[:, None], 0.0).to(dtype)) + self.position(positions)
        return self.norm(hidden + masked[:, None].to(dtype) * self.mask + type_e)


@dataclass
class MaskedReadings(BatchPart):
    index: torch.Tensor  # int64 [m], packed positions
    rows: torch.Tensor  # int64 [m], touch rows

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        return (self.index,)


class MaskedTouchModeling(TokenLevelTask):
    """Regression of the masked readings. `sample.targets["mtm"]` is True."""

    name = "mtm"
    about = "Masked touch modelling."
    losses = (Loss("mtm", "mtm.", about),)
    modality, modality_word, min_items = TOUCH, "touch", 2
    masked_modalities = (TOUCH,)

    def flops_per_item(self) -> float:
        return self.config.model.hidden_size * self.config.model.touch.feature_dim

    def add_targets(self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore) -> None:
        sample.targets[self.name] = True

    def collate(self, samples: Sequence[Sample], layout: Layout) -> MaskedReadings:
        places = masked_places(samples, self.name, TOUCH)
        return MaskedReadings(
            index=join([layout.first[i, TOUCH] + p for i, p in places], np.int64),
            rows=join([layout.row_start[i, TOUCH] + p for i, p in places], np.int64),
        )

    @classmethod
    def make_head(cls, model: ModelConfig, tasks: TasksConfig, word: nn.Embedding) -> nn.Module:
        return nn.Linear(model.hidden_size, model.touch.feature_dim)

    @classmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        assert head is not None and isinstance(part, MaskedReadings)
        predicted = head(encoded.hidden_te.index_select(0, part.index)).float()
        error = predicted - encoded.features[TOUCH].index_select(0, part.rows)
        return {"mtm": LossTerm(error.square().mean(-1).sum(), float(len(part.rows)), {})}

    def baseline(self, statistics: TrainingStatistics) -> Baseline:
        """The mean reading of the training split."""

        def losses(sample: Sample, number: int) -> dict[str, np.ndarray]:
            touch = sample.of(TOUCH)
            return {"mtm": statistics.mean_error(touch.features[given(touch.masked)], number, "touch", 1)}

        return SampleBaseline(self.name, losses)
