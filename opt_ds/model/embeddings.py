"""Input embeddings: one embedder per modality, whose rows are put into packed order.

Legend: t packed rows, e width.
"""

from typing import cast

import torch
from torch import nn

from opt_ds.config import ModelConfig
from opt_ds.data.batch import EncoderInputs
from opt_ds.data.modality import modalities_of
from opt_ds.modalities.text import Text, TextEmbedder
from opt_ds.nn.transformer import Dropout
from opt_ds.nn.word_embedding import WordEmbedding


class InputEmbeddings(nn.Module):
    """The embedders of all modalities, followed by dropout.

    The output is the packed rows and the standardised features, which are also targets of tasks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.modalities = modalities_of(config)
        for modality in self.modalities:
            self.add_module(modality.embedder, modality.make_embedder())
        self.modality = nn.Embedding(len(self.modalities), config.hidden_size)
        self.dropout = Dropout(config.dropout)
        for modality in self.modalities:
            if (standardizer := modality.make_standardizer()) is not None:
                self.add_module(modality.standardizer, standardizer)

    @property
    def word(self) -> WordEmbedding:
        """The table of word embeddings, which decoders and heads share."""
        return cast(TextEmbedder, self.get_submodule(Text.embedder)).word

    def forward(self, inputs: EncoderInputs) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Return hidden_te, and the standardised original features of each modality that has features, float32."""
        types_me = self.modality.weight
        features: dict[int, torch.Tensor] = {}
        rows = []
        for modality in self.modalities:
            number, batch = modality.number, inputs.parts[modality.number]
            stored = modality.features(batch)
            if stored is not None:
                features[number] = self.get_submodule(modality.standardizer)(stored)
            embedder = self.get_submodule(modality.embedder)
            rows.append(modality.embed(embedder, batch, features.get(number), types_me[number]))
        hidden_te = torch.cat(rows).index_select(0, inputs.gather_index)
        return self.dropout(hidden_te, inputs.sequences), features
