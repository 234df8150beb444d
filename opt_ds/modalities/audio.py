"""Audio: frames of speech, each of which may stack several stored frames.

Legend: a frame rows (or model frames of one sample), T stored frames, e width, v feature width of a stored frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from opt_ds.config import DataConfig, ModelConfig
from opt_ds.data.layout import Layout, join
from opt_ds.data.lengths import stacked_length
from opt_ds.data.masking import masked_spans, num_masked
from opt_ds.modalities.features import FeatureBatch, FeatureItems, FeatureModality
from opt_ds.nn.transformer import LayerNorm, summand_norm
from opt_ds.ops.keyed import keyed_choice
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import Dims, StoreDescription


@dataclass
class AudioItems(FeatureItems):
    """Model frames of one sample. Their features are float16 [a, stack · v]."""


@dataclass
class AudioBatch(FeatureBatch):
    """Frame rows of a batch."""

    positions: torch.Tensor  # int64 [a]
    masked: torch.Tensor  # bool [a]


class Audio(FeatureModality[AudioItems, AudioBatch]):
    """Audio frames. Masked frames form spans, because a single frame could be copied from its neighbours."""

    name = "audio"
    item_word, row_word = "frames", "audio clips"
    embedder, standardizer = "frames", "frame_standardizer"
    limit_key = "max_frames"

    @property
    def limit(self) -> int:
        """Longest audio, in model frames."""
        return self.model.max_frames

    @property
    def stack(self) -> int:
        """Number of stored frames that form one model frame."""
        return self.model.audio_stack

    @property
    def feature_dim(self) -> int:
        """Size of a stored frame."""
        return self.model.audio_feature_dim

    @property
    def projected_dim(self) -> int:
        """Dimension of a model frame."""
        return self.stack * self.feature_dim

    def limit_note(self, dims: Sequence[Dims]) -> str:
        """Return the limit in seconds."""
        rate_hz = min(own.audio_frame_rate_hz for own in dims)
        return f" ({self.limit * self.stack / rate_hz:.1f} s)" if rate_hz > 0 else ""

    def count_masked(self, lengths: np.ndarray | int, probability: float) -> np.ndarray:
        """Return `num_masked`, but leave at least one frame of an utterance unmasked.

        That frame is the context, and a negative of the contrastive loss.
        """
        return np.minimum(num_masked(lengths, probability), np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0))

    def store_sizes(self, store: StoreDescription) -> dict[str, int]:
        """Return the size of a stored frame."""
        return {"audio_feature_dim": store.dims.audio_feature_dim}

    def stored_bytes(self, dims: Dims) -> int:
        """Return the bytes of a stored frame."""
        return 2 * dims.audio_feature_dim

    def read(self, store: FeatureStore, row: int, data: DataConfig | None = None, key: int | None = None) -> AudioItems:
        """Return the first frames of an audio row. `data.frame_offset` varies the offset of the first one."""
        augmented = data is not None and data.frame_offset and key is not None
        offset = int(keyed_choice(self.stack, key, "offset")) if augmented and key is not None else 0
        return self.items_of(store.frames(row), offset)

    def items_of(self, features: np.ndarray, offset: int = 0) -> AudioItems:
        """Return the first model frames of stored frames [T, v]."""
        return AudioItems(stack_frames(features, self.stack, offset)[: self.limit])

    def mask(self, items: AudioItems, store: FeatureStore, probability: float, span: int, key: int) -> None:
        """Mask spans of frames."""
        count = int(self.count_masked(len(items), probability))
        items.masked = masked_spans(len(items), count, span, key, self.number)

    def collate(self, items: Sequence[AudioItems | None], layout: Layout) -> AudioBatch:
        """Return the frames of all samples."""
        frames = [own for own in items if own is not None]
        return AudioBatch(
            index=torch.from_numpy(layout.index_of(self.number)),
            features=join([own.features for own in frames], np.float16, (self.projected_dim,)),
            positions=join([np.arange(len(own)) for own in frames], np.int64),
            masked=join([own.is_masked for own in frames], bool),
        )

    def make_embedder(self) -> nn.Module:
        """Return the embedder of frames."""
        return FrameEmbedder(self.model)

    def embed(
        self, embedder: nn.Module, batch: AudioBatch, features: torch.Tensor | None, type_e: torch.Tensor
    ) -> torch.Tensor:
        """Return the embeddings of the frame rows."""
        return embedder(features, batch.positions, batch.masked, type_e)

def stack_frames(frames: np.ndarray, stack: int, offset: int) -> np.ndarray:
    """Return frames [T, v] as [a, stack · v], with `stack` frames per row.

    The first frame is repeated `offset` times at the start, and the last one at the end as needed. `a` does not depend
    on the offset (0 <= offset < stack).
    """
    if stack == 1 or not len(frames):
        return frames.reshape(len(frames), stack * frames.shape[1])
    count = int(stacked_length(len(frames), stack))
    place = np.clip(np.arange(count * stack) - offset, 0, len(frames) - 1)
    return frames[place].reshape(count, -1)


class FrameEmbedder(nn.Module):
    """FC(frame) + position + type -> LN. A masked frame is zero, and a learned vector is added.

    With `normalize_embedding_summands`: LN(FC(frame)) + LN(position) + type -> LN. The learned vector then belongs to the
    first summand.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.feature = nn.Linear(config.audio_stack * config.audio_feature_dim, config.hidden_size)
        self.position = nn.Embedding(config.max_frames, config.hidden_size)
        self.mask = nn.Parameter(torch.zeros(config.hidden_size))
        self.norm = LayerNorm(config)
        self.normalizes = config.normalize_embedding_summands
        self.feature_norm, self.position_norm = summand_norm(config), summand_norm(config)

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
        feature_ae = self.feature(frames_av.masked_fill(masked_a[:, None], 0.0).to(dtype))
        position_ae, mask_ae = self.position(positions_a), masked_a[:, None].to(dtype) * self.mask
        if self.normalizes:
            return self.norm(self.feature_norm(feature_ae + mask_ae) + self.position_norm(position_ae) + type_e)
        return self.norm(feature_ae + position_ae + mask_ae + type_e)
