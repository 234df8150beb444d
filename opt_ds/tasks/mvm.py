"""Masked vision modelling on the masked regions: feature regression (MVFR) and region classification (MRC)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from opt_ds.config import ModelConfig, TasksConfig
from opt_ds.data.layout import Layout, join
from opt_ds.data.modalities import IMAGE
from opt_ds.data.sample import Sample, given
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import BatchPart
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Encoded, Loss, LossTerm, classification_term
from opt_ds.tasks.baselines import Baseline, SampleBaseline, TrainingStatistics
from opt_ds.tasks.token_level import TokenLevelTask, masked_places


@dataclass
class MaskedRegions(BatchPart):
    """Masked regions of a batch."""

    index: torch.Tensor  # int64 [m], packed positions
    rows: torch.Tensor  # int64 [m], region rows
    labels: torch.Tensor  # int64 [m], the detector's class

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        """Return the positions of the masked regions."""
        return (self.index,)


class MvmHead(nn.Module):
    """Head of MVFR and MRC.

    MVFR: FC to the input's dimension, squared error averaged over dimensions. MRC: FC, cross-entropy with the
    detector's class. Without classes there is no MRC.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.regress = nn.Linear(config.hidden_size, config.image_feature_dim)
        self.classify = nn.Linear(config.hidden_size, config.image_num_classes) if has_classes(config) else None

    def forward(self, hidden_te: torch.Tensor, masked: MaskedRegions, regions_rv: torch.Tensor) -> dict[str, LossTerm]:
        """Return the terms of MVFR and MRC. `regions_rv` are the original features, float32."""
        hidden_me = hidden_te.index_select(0, masked.index)
        error = self.regress(hidden_me).float() - regions_rv.index_select(0, masked.rows)
        regressed = LossTerm(error.square().mean(-1).sum(), float(len(masked.rows)), {})
        if self.classify is None:
            zero = torch.zeros((), device=hidden_te.device)
            return {"mvfr": regressed, "mrc": LossTerm(zero, 0.0, {"correct": zero})}
        return {"mvfr": regressed, "mrc": classification_term(self.classify(hidden_me), masked.labels)}


def has_classes(model: ModelConfig) -> bool:
    """Return whether the regions have classes to predict."""
    return model.image_num_classes >= 2


class MaskedVisionModeling(TokenLevelTask):
    """Masked vision modelling. `sample.targets["mvm"]` is int64 [r], the classes of the sample's regions."""

    name = "mvm"
    about = "Masked vision modelling. Its weight is a factor on `mvfr` and `mrc`."
    losses = (
        Loss("mvfr", "mvm.regress.", "Masked vision modelling: regression of the masked regions' features."),
        Loss(
            "mrc", "mvm.classify.", "Masked vision modelling: classification of the masked regions.",
            settings=("image_num_classes",),
        ),
    )
    modality, modality_word = IMAGE, "image"
    masked_modalities = (IMAGE,)

    def flops_per_item(self) -> float:
        """Return the multiplications of both linear layers."""
        model = self.config.model
        return model.hidden_size * (model.image_feature_dim + (model.image_num_classes if has_classes(model) else 0))

    def disabled(self, present: np.ndarray, stores: list[FeatureStore], derived: Any) -> dict[str, str]:
        """Return a reason if no sample has an image, and one for MRC if the regions have no classes."""
        reasons = super().disabled(present, stores, derived)
        if not has_classes(self.config.model) and "mrc" in self.active:
            reasons["mrc"] = "the store's image regions have no classes (their extractor gives none)"
        return reasons

    def num_terms(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of masked regions for each loss; 0 for MRC if the regions have no classes."""
        terms = super().num_terms(samples)
        return terms if has_classes(self.config.model) else {**terms, "mrc": 0.0}

    def add_targets(self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore) -> None:
        """Set the region classes of the sample."""
        sample.targets[self.name] = sample.of(IMAGE).labels

    def collate(self, samples: Sequence[Sample], layout: Layout) -> MaskedRegions:
        """Return the masked regions with their classes."""
        places = masked_places(samples, self.name, IMAGE)
        return MaskedRegions(
            index=join([layout.first[i, IMAGE] + p for i, p in places], np.int64),
            rows=join([layout.row_start[i, IMAGE] + p for i, p in places], np.int64),
            labels=join([samples[i].targets[self.name][p] for i, p in places], np.int64),
        )

    @classmethod
    def make_head(cls, model: ModelConfig, tasks: TasksConfig, word: nn.Embedding) -> nn.Module:
        """Return the head."""
        return MvmHead(model)

    @classmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        """Return the terms of MVFR and MRC."""
        assert head is not None
        return head(encoded.hidden_te, part, encoded.features[IMAGE])

    def baseline(self, statistics: TrainingStatistics) -> Baseline:
        """Return the baselines of MVFR and MRC.

        They are the mean of the training features, and the classes' training frequencies.
        """

        def losses(sample: Sample, number: int) -> dict[str, np.ndarray]:
            regions = sample.of(IMAGE)
            masked = given(regions.masked)
            found = {"mvfr": statistics.mean_error(regions.features[masked], number, "image", 1)}
            if has_classes(self.config.model):
                found["mrc"] = statistics.classes[sample.targets[self.name][masked]]
            return found

        return SampleBaseline(self.name, losses)
