"""Masked vision modelling on the same masked regions: feature regression (MVFR) and region classification (MRC)."""

import torch
from torch import nn

from opt_ds.config import ModelConfig
from opt_ds.data.batch import MaskedRegions
from opt_ds.tasks.base import LossTerm, classification_term


class MaskedVisionModeling(nn.Module):
    """MVFR: FC to the input's dimension, squared error averaged over dimensions.

    MRC: FC, cross-entropy with the detector's class.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.regress = nn.Linear(config.hidden_size, config.image_feature_dim)
        self.classify = nn.Linear(config.hidden_size, config.image_num_classes)

    def forward(self, hidden_te: torch.Tensor, masked: MaskedRegions, regions_rv: torch.Tensor) -> dict[str, LossTerm]:
        """regions_rv: the original features, float32."""
        hidden_me = hidden_te.index_select(0, masked.index)
        error = self.regress(hidden_me).float() - regions_rv.index_select(0, masked.rows)
        return {
            "mvfr": LossTerm(error.square().mean(-1).sum(), float(len(masked.rows)), {}),
            "mrc": classification_term(self.classify(hidden_me), masked.labels),
        }
