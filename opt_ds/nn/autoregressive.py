"""Autoregressive decoder over the encoder's output: the base class of the text decoder and the image decoder."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from opt_ds.config import ModelConfig
from opt_ds.nn.inputs import DecoderBatch
from opt_ds.nn.transformer import Decoder, Dropout, LayerCache, LayerNorm
from opt_ds.ops.linear_cross_entropy import linear_cross_entropy
from opt_ds.ops.sequences import Sequences


class AutoregressiveDecoder(nn.Module, ABC):
    """Base class of the decoders.

    It embeds the items written so far, attends to the encoder's output and scores the next item. Subclasses supply the
    embedding and the output projection, which are tied. `num_positions` is the maximum length of a sequence. `position`
    embeds positions int64 [w] as [w, e]; None: a table with a row per position.
    """

    num_positions: int

    def __init__(
        self, config: ModelConfig, num_layers: int, num_positions: int, num_outputs: int, position: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.num_positions = num_positions
        self.position = nn.Embedding(num_positions, config.hidden_size) if position is None else position
        self.norm = LayerNorm(config)
        self.dropout = Dropout(config.dropout)
        self.decoder = Decoder(config, num_layers)
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    @abstractmethod
    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [w, e] of the items written so far."""

    @abstractmethod
    def _output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight [outputs, e] and the bias [outputs] of the output projection."""

    def forward(self, decoder_batch: DecoderBatch, hidden_te: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the teacher-forced loss over all decoder targets.

        `hidden_te` is the encoder's packed output. Return two fp32 scalars: the cross-entropy summed over the targets,
        and the number of targets with the highest score.
        """
        return linear_cross_entropy(self._hidden(decoder_batch, hidden_te), *self._output(), decoder_batch.target_ids)

    def scores(self, decoder_batch: DecoderBatch, hidden_te: torch.Tensor) -> torch.Tensor:
        """Return the teacher-forced scores [w, outputs] of every target position."""
        return F.linear(self._hidden(decoder_batch, hidden_te), *self._output())

    def _hidden(self, decoder_batch: DecoderBatch, hidden_te: torch.Tensor) -> torch.Tensor:
        memory_ue = hidden_te.index_select(0, decoder_batch.memory_index)
        hidden_we = self._input(decoder_batch.input_ids, decoder_batch.positions, decoder_batch.sequences)
        return self.decoder(
            hidden_we, decoder_batch.sequences, memory_ue, decoder_batch.memory, decoder_batch.query_groups
        )

    def start(self, memory_ue: torch.Tensor, memory: Sequences, length: int | None = None) -> list[LayerCache]:
        """Return empty caches for incremental decoding, one decoded sequence per memory sequence.

        `length` is the maximum number of items; None allows all positions.
        """
        return self.decoder.start(memory_ue, memory, length or self.num_positions)

    def decode(self, ids_b: torch.Tensor, position: int, caches: list[LayerCache]) -> torch.Tensor:
        """Return the scores [b, outputs] of the next item. `ids_b` holds the last items, which are at `position`."""
        positions_b = torch.full_like(ids_b, position)
        return F.linear(self.decoder.decode(self._input(ids_b, positions_b), caches), *self._output())

    def _input(self, ids: torch.Tensor, positions: torch.Tensor, sequences: Sequences | None = None) -> torch.Tensor:
        return self.dropout(self.norm(self._embed(ids) + self.position(positions)), sequences)
