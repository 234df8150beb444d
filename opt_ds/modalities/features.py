"""Standardisation of feature vectors, for modalities whose items are vectors.

Legend: v feature width.
"""

import torch
from torch import nn

from opt_ds.config import STANDARD_LIMIT


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
