"""OPT: embedders, cross-modal encoder, decoders and task heads in one module.

One encoder pass serves all tasks of a batch.
"""

import math
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import nn

from opt_ds.config import ModelConfig, TasksConfig
from opt_ds.data.batch import EncoderInputs, PackedBatch
from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.modalities.features import FeatureStandardizer
from opt_ds.model.decoders import ImageDecoder, TextDecoder
from opt_ds.model.embeddings import InputEmbeddings
from opt_ds.nn.inputs import OutputPositions
from opt_ds.nn.transformer import Encoder, LayerStack, number_dropout_layers
from opt_ds.ops.sequences import Sequences
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Encoded, LossTerm


class OPT(nn.Module):
    """The Omni-Perception Pre-Trainer (Liu et al. 2021, §3)."""

    def __init__(self, model: ModelConfig, tasks: TasksConfig) -> None:
        super().__init__()
        self.config = model
        self.embeddings = InputEmbeddings(model)
        self.encoder = Encoder(model)
        word = self.embeddings.word
        self.text_decoder = TextDecoder(model, word)
        self.image_decoder = ImageDecoder(model)
        self.tasks = dict(tasks.units)
        for name, task in self.tasks.items():  # the name of the task is the prefix of its head's parameters
            if (head := task.make_head(model, tasks, word)) is not None:
                self.add_module(name, head)
        number_dropout_layers(self)
        self._initialize()

    def forward(self, batch: PackedBatch) -> dict[str, LossTerm]:
        """Return the term of every loss for this micro-batch. Losses without work return 0, with gradients of 0."""
        hidden_te, features = self._encode(batch.inputs, batch.read)
        decoders = {TEXT: self.text_decoder, IMAGE: self.image_decoder}
        encoded = Encoded(hidden_te, batch.inputs, features, decoders)
        terms: dict[str, LossTerm] = {}
        for name, part in batch.parts.items():
            terms |= self.tasks[name].terms(self.head(name), encoded, part)
        return terms

    def head(self, task: str) -> nn.Module | None:
        """Return a task's head, or None if it has none."""
        return self._modules.get(task)

    def encode(self, inputs: EncoderInputs) -> torch.Tensor:
        """Return hidden_te, the encoder's packed output for any mixture of modalities."""
        return self._encode(inputs)[0]

    def encode_cls(self, inputs: EncoderInputs) -> torch.Tensor:
        """Return cls_se, the encoder's [CLS] of each sample. The last layer computes no other position."""
        one_each = Sequences.from_lengths(np.ones(len(inputs.sequences)), inputs.sequences.cu_seqlens.device)
        read = OutputPositions(inputs.cls_index, replace(one_each, sample_index=inputs.sequences.sample_index))
        return self._encode(inputs, read)[0].index_select(0, inputs.cls_index)

    def _encode(
        self, inputs: EncoderInputs, read: OutputPositions | None = None
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        hidden_te, features = self.embeddings(inputs)
        return self.encoder(hidden_te, inputs.sequences, read), features

    def recompute_layers(self, recompute: bool = True) -> "OPT":
        """Set whether activations are recomputed in backward, which saves memory and takes time (see `LayerStack`).

        Return self.
        """
        for module in self.modules():
            if isinstance(module, LayerStack):
                module.recompute = recompute
        return self

    def set_feature_statistics(self, stores: list[FeatureStore]) -> None:
        """Set the standardisation from the stores' training statistics, pooled by the number of vectors."""
        for modality in self.embeddings.modalities:
            if not modality.standardizer:
                continue
            standardizer = cast(FeatureStandardizer, self.embeddings.get_submodule(modality.standardizer))
            described = [store.description.statistics.get(modality.name) for store in stores]
            found = [statistics for statistics in described if statistics and statistics.count]
            if found:  # otherwise no training sample has the modality, and the identity is kept
                standardizer.set_statistics(*_pooled(found))

    def _initialize(self) -> None:
        """Initialise the weights as BERT does.

        With `embedding_range`, all summands of an input embedding start with this deviation: tables directly, and
        projections scaled so that features of unit variance are mapped to it.
        """
        config = self.config
        table_range = config.embedding_range or config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=table_range)
        for modality in self.embeddings.modalities:
            mask, projections = modality.initialized_parts(self.embeddings.get_submodule(modality.embedder))
            if mask is not None:
                nn.init.normal_(mask, std=table_range)
            if config.embedding_range:
                for projection in projections:
                    nn.init.normal_(projection.weight, std=table_range / math.sqrt(projection.in_features))


def _pooled(statistics: list) -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.tensor([float(s.count) for s in statistics], dtype=torch.float64)
    weights = (counts / counts.sum())[:, None]
    means = torch.tensor([s.mean for s in statistics], dtype=torch.float64)
    stds = torch.tensor([s.std for s in statistics], dtype=torch.float64)
    mean = (weights * means).sum(0)
    variance = (weights * (stds.square() + (means - mean).square())).sum(0)
    return mean.float(), variance.sqrt().float()
