"""Modalities whose items are feature vectors: base class, and the standardisation of the features.

Legend: n items of a sample, r rows of a batch, v feature width.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from opt_ds.config import STANDARD_LIMIT
from opt_ds.data.modality import Items, Modality, ModalityBatch


@dataclass
class FeatureItems(Items):
    """Feature vectors of one sample."""

    features: np.ndarray  # float16 [n, v], the original features even where masked

    def __len__(self) -> int:
        return len(self.features)


@dataclass
class FeatureBatch(ModalityBatch):
    """Feature vectors of a batch."""

    features: torch.Tensor  # float16 [r, v], the original features even where masked


AnyFeatureItems = TypeVar("AnyFeatureItems", bound=FeatureItems)
AnyFeatureBatch = TypeVar("AnyFeatureBatch", bound=FeatureBatch)


class FeatureModality(Modality[AnyFeatureItems, AnyFeatureBatch]):
    """A modality of feature vectors, which are standardised.

    The embedder has a vector `mask` for masked items and a projection `feature`.
    """

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """Size of a stored feature."""

    def make_standardizer(self) -> nn.Module:
        """Return the standardisation of the features."""
        return FeatureStandardizer(self.feature_dim, self.stack, self.model.standardize_features)

    def features(self, batch: AnyFeatureBatch) -> torch.Tensor:
        """Return the features of the rows."""
        return batch.features

    def initialized_parts(self, embedder: Any) -> tuple[nn.Parameter | None, list[nn.Linear]]:
        """Return the vector of masked items, and the projection of features."""
        return embedder.mask, [embedder.feature]


class FeatureStandardizer(nn.Module):
    """(x − mean) / deviation, clamped.

    It is the identity until statistics are set. The statistics are stored with the weights.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, feature_dim: int, repeat: int, enabled: bool) -> None:
        super().__init__()
        self.repeat, self.enabled = repeat, enabled
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))

    def set_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set mean and standard deviation [v] of the training split. A dimension that never varies keeps its scale."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-4, std, 1.0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return standardised features, float32 of the same shape. The last dimension holds `repeat` stored vectors."""
        features = features.float()
        if not self.enabled:
            return features
        mean, std = self.mean.float().repeat(self.repeat), self.std.float().repeat(self.repeat)
        return ((features - mean) / std).clamp(-STANDARD_LIMIT, STANDARD_LIMIT)
