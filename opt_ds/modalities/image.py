"""Image: the features, boxes and classes of its regions.

Legend: r region rows (or regions of one sample), e width, v feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from opt_ds.config import DataConfig, ModelConfig
from opt_ds.data.layout import Layout, join
from opt_ds.modalities.features import FeatureBatch, FeatureItems, FeatureModality
from opt_ds.nn.transformer import LayerNorm, summand_norm
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import BOX_SIZE, Dims, StoreDescription


@dataclass
class ImageItems(FeatureItems):
    """Regions of one sample."""

    boxes: np.ndarray  # float32 [r, 7]
    labels: np.ndarray  # int64 [r], the detector's classes


@dataclass
class ImageBatch(FeatureBatch):
    """Region rows of a batch."""

    boxes: torch.Tensor  # float32 [r, 7]
    masked: torch.Tensor  # bool [r]


class Image(FeatureModality[ImageItems, ImageBatch]):
    """Image regions."""

    name = "image"
    item_word, row_word = "regions", "images"
    embedder, standardizer = "regions", "region_standardizer"
    limit_key = "max_regions"
    free_keys = ("max_regions",)  # no position table has its size

    @property
    def limit(self) -> int:
        """Largest number of regions."""
        return self.model.max_regions

    @property
    def feature_dim(self) -> int:
        """Size of a region's feature."""
        return self.model.image_feature_dim

    @property
    def projected_dim(self) -> int:
        """Dimensions of a region's feature and box."""
        return self.feature_dim + BOX_SIZE

    def store_sizes(self, store: StoreDescription) -> dict[str, int]:
        """Return the sizes of features and classes."""
        dims = store.dims
        return {"image_feature_dim": dims.image_feature_dim, "image_num_classes": dims.image_num_classes}

    def stored_bytes(self, dims: Dims) -> int:
        """Return the bytes of a region: feature, box, class and score."""
        return 2 * dims.image_feature_dim + BOX_SIZE * 4 + 2 * 2

    def read(self, store: FeatureStore, row: int, data: DataConfig | None = None, key: int | None = None) -> ImageItems:
        """Return the first regions of an image."""
        return self.items_of(store.regions(row))

    def items_of(self, features: Any) -> ImageItems:
        """Return the first regions of features, boxes and labels, as in `opt_ds.store.reader.Regions`."""
        limit = self.limit
        return ImageItems(features.features[:limit], features.boxes[:limit], features.labels[:limit].astype(np.int64))

    def collate(self, items: Sequence[ImageItems | None], layout: Layout) -> ImageBatch:
        """Return the regions of all samples."""
        regions = [own for own in items if own is not None]
        return ImageBatch(
            index=torch.from_numpy(layout.index_of(self.number)),
            features=join([own.features for own in regions], np.float16, (self.feature_dim,)),
            boxes=join([own.boxes for own in regions], np.float32, (BOX_SIZE,)),
            masked=join([own.is_masked for own in regions], bool),
        )

    def make_embedder(self) -> nn.Module:
        """Return the embedder of regions."""
        return RegionEmbedder(self.model)

    def embed(
        self, embedder: nn.Module, batch: ImageBatch, features: torch.Tensor | None, type_e: torch.Tensor
    ) -> torch.Tensor:
        """Return the embeddings of the region rows."""
        return embedder(features, batch.boxes, batch.masked, type_e)

    def initialized_parts(self, embedder: Any) -> tuple[nn.Parameter | None, list[nn.Linear]]:
        """Return the vector of masked regions, and the projections of feature and box."""
        return embedder.mask, [embedder.feature, embedder.box]


class RegionEmbedder(nn.Module):
    """FC(feature) + FC(box) + type -> LN. The feature of a masked region is zero, and a learned vector is added.

    With `normalize_embedding_summands`: LN(FC(feature)) + LN(FC(box)) + type -> LN. The learned vector then belongs to the
    first summand.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.feature = nn.Linear(config.image_feature_dim, config.hidden_size)
        self.box = nn.Linear(BOX_SIZE, config.hidden_size)
        self.mask = nn.Parameter(torch.zeros(config.hidden_size))
        self.norm = LayerNorm(config)
        self.normalizes = config.normalize_embedding_summands
        self.feature_norm, self.box_norm = summand_norm(config), summand_norm(config)

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
        feature_re = self.feature(features_rv.masked_fill(masked_r[:, None], 0.0).to(dtype))
        box_re, mask_re = self.box(boxes_r7.to(dtype)), masked_r[:, None].to(dtype) * self.mask
        if self.normalizes:
            return self.norm(self.feature_norm(feature_re + mask_re) + self.box_norm(box_re) + type_e)
        return self.norm(feature_re + box_re + mask_re + type_e)
