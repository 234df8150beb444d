"""A decoder that writes item by item from the encoder's output; text and image decoder are made of it."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from opt_ds.config import ModelConfig
from opt_ds.nn.inputs import Written
from opt_ds.nn.transformer import Decoder, Dropout, LayerCache, LayerNorm
from opt_ds.ops.linear_cross_entropy import linear_cross_entropy
from opt_ds.ops.sequences import Sequences


class AutoregressiveDecoder(nn.Module, ABC):
    """Embeds what is already written, attends to the encoder's output, scores what comes next; embedding and scores are tied.

    `num_positions` bounds the length.
    """

    num_positions: int

    def __init__(self, config: ModelConfig, num_layers: int, num_positions: int, num_outputs: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        self.position = nn.Embedding(num_positions, config.hidden_size)
        self.norm = LayerNorm(config)
        self.dropout = Dropout(config.dropout)
        self.decoder = Decoder(config, num_layers)
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    @abstractmethod
    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [w, e] of the items written so far."""

    @abstractmethod
    def _output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [outputs, e] and bias [outputs] of the scores."""

    def forward(self, written: Written, hidden_te: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed cross-entropy of everything to be written, how many items score highest), teacher-forced, given the encoder's
        packed output; fp32 scalars."""
        return linear_cross_entropy(self._hidden(written, hidden_te), *self._output(), written.target_ids)

    def scores(self, written: Written, hidden_te: torch.Tensor) -> torch.Tensor:
        """Scores [w, outputs] of every written position, teacher-forced."""
        return F.linear(self._hidden(written, hidden_te), *self._output())

    def _hidden(self, written: Written, hidden_te: torch.Tensor) -> torch.Tensor:
        memory_ue = hidden_te.index_select(0, written.memory_index)
        hidden_we = self._input(written.input_ids, written.positions, written.sequences)
        return self.decoder(hidden_we, written.sequences, memory_ue, written.memory, written.readers)

    def start(self, memory_ue: torch.Tensor, memory: Sequences, length: int | None = None) -> list[LayerCache]:
        """Caches to begin writing with, one sequence per memory sequence, of `length` items at most (None: of all positions)."""
        return self.decoder.start(memory_ue, memory, length or self.num_positions)

    def decode(self, ids_b: torch.Tensor, position: int, caches: list[LayerCache]) -> torch.Tensor:
        """Scores [b, outputs] of the next item, given the item written last (at `position`)."""
        positions_b = torch.full_like(ids_b, position)
        return F.linear(self.decoder.decode(self._input(ids_b, positions_b), caches), *self._output())

    def _input(self, ids: torch.Tensor, positions: torch.Tensor, sequences: Sequences | None = None) -> torch.Tensor:
        return self.dropout(self.norm(self._embed(ids) + self.position(positions)), sequences)
