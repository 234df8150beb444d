"""Embedders of the three modalities, which project to the encoder's width.

`InputEmbeddings` puts their rows into packed order.

Legend: n text rows, r region rows, a frame rows, t packed rows; e width; v feature width.
"""

from typing import Any

import torch
from torch import nn

from opt_ds.config import STANDARD_LIMIT, ModelConfig
from opt_ds.data.batch import EncoderInputs
from opt_ds.nn.transformer import Dropout, LayerNorm

TEXT_TYPE, IMAGE_TYPE, AUDIO_TYPE = range(3)


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


class _NoRows(torch.autograd.Function):
    """Rows [0, e] of a table. Backward gives the table no gradient, instead of zeros of its size."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor) -> torch.Tensor:
        return table.new_empty(0, table.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:  # type: ignore[override]
        return None


class WordEmbedding(nn.Embedding):
    """Table of WordPiece embeddings that the embedder and the text decoder share.

    ZeRO 3 gathers the table when this module is called, in forward and backward. Every rank must therefore call it in
    every micro-batch, with or without ids. Every rank must also give the table a gradient; the embedder does.
    """

    def forward(self, ids: torch.Tensor, skip_empty_gradient: bool = False) -> torch.Tensor:
        """Return embeddings [n, e] of ids [n].

        With `skip_empty_gradient` and no ids, this call gives the table no gradient, instead of zeros.
        """
        return _NoRows.apply(self.weight) if skip_empty_gradient and not len(ids) else super().forward(ids)


class TextEmbedder(nn.Module):
    """Token + position + type -> LN (BERT's embedding)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word = WordEmbedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_text_tokens + 2, config.hidden_size)
        self.norm = LayerNorm(config)

    def forward(self, token_ids_n: torch.Tensor, positions_n: torch.Tensor, type_e: torch.Tensor) -> torch.Tensor:
        """Return embeddings [n, e]."""
        return self.norm(self.word(token_ids_n) + self.position(positions_n) + type_e)


class RegionEmbedder(nn.Module):
    """FC(feature) + FC(box) + type -> LN. The feature of a masked region is zero, and a learned vector is added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.feature = nn.Linear(config.image_feature_dim, config.hidden_size)
        self.box = nn.Linear(7, config.hidden_size)
        self.mask = nn.Parameter(torch.zeros(config.hidden_size))
        self.norm = LayerNorm(config)

    def forward(
        self, features_rv: torch.Tensor, boxes_r7: torch.Tensor, masked_r: torch.Tensor, type_e: torch.Tensor
    ) -> torch.Tensor:
        """Return embeddings [r, e].

        Args:
            features_rv: Standardised features.
            boxes_r7: Boxes.
            masked_r: Which regions are masked, bool.
            type_e: The type embedding of images.
        """
        dtype = self.feature.weight.dtype
        hidden_re = self.feature(features_rv.masked_fill(masked_r[:, None], 0.0).to(dtype)) + self.box(boxes_r7.to(dtype))
        return self.norm(hidden_re + masked_r[:, None].to(dtype) * self.mask + type_e)


class FrameEmbedder(nn.Module):
    """FC(frame) + position + type -> LN. A masked frame is zero, and a learned vector is added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.feature = nn.Linear(config.audio_stack * config.audio_feature_dim, config.hidden_size)
        self.position = nn.Embedding(config.max_frames, config.hidden_size)
        self.mask = nn.Parameter(torch.zeros(config.hidden_size))
        self.norm = LayerNorm(config)

    def forward(
        self, frames_av: torch.Tensor, positions_a: torch.Tensor, masked_a: torch.Tensor, type_e: torch.Tensor
    ) -> torch.Tensor:
        """Return embeddings [a, e].

        Args:
            frames_av: Standardised features.
            positions_a: Positions of the frames in their sample.
            masked_a: Which frames are masked, bool.
            type_e: The type embedding of audio.
        """
        dtype = self.feature.weight.dtype
        hidden_ae = self.feature(frames_av.masked_fill(masked_a[:, None], 0.0).to(dtype)) + self.position(positions_a)
        return self.norm(hidden_ae + masked_a[:, None].to(dtype) * self.mask + type_e)


class InputEmbeddings(nn.Module):
    """All three embedders, followed by dropout.

    The output is the packed rows and the standardised features, which are also targets of tasks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.text, self.regions, self.frames = TextEmbedder(config), RegionEmbedder(config), FrameEmbedder(config)
        self.modality = nn.Embedding(3, config.hidden_size)
        self.dropout = Dropout(config.dropout)
        self.region_standardizer = FeatureStandardizer(config.image_feature_dim, 1, config.standardize_features)
        self.frame_standardizer = FeatureStandardizer(
            config.audio_feature_dim, config.audio_stack, config.standardize_features
        )

    def forward(self, inputs: EncoderInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return hidden_te, and the original features regions_rv and frames_av in float32."""
        regions_rv = self.region_standardizer(inputs.region_features)
        frames_av = self.frame_standardizer(inputs.frames)
        type_3e = self.modality.weight
        rows_te = torch.cat(
            [
                self.text(inputs.token_ids, inputs.token_positions, type_3e[TEXT_TYPE]),
                self.regions(regions_rv, inputs.region_boxes, inputs.region_masked, type_3e[IMAGE_TYPE]),
                self.frames(frames_av, inputs.frame_positions, inputs.frame_masked, type_3e[AUDIO_TYPE]),
            ]
        )
        return self.dropout(rows_te.index_select(0, inputs.gather_index), inputs.sequences), regions_rv, frames_av
