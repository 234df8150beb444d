"""The text decoder and the image decoder: what they write, token by token or code by code, from the encoder's output."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from opt_ds.config import ModelConfig
from opt_ds.data.batch import Written
from opt_ds.model.embeddings import WordEmbedding
from opt_ds.model.transformer import Decoder, Dropout, LayerCache, LayerNorm
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


class TextDecoder(AutoregressiveDecoder):
    """Writes WordPieces; the word embedding is the text embedder's own. Begins with [CLS], ends with [SEP]."""

    def __init__(self, config: ModelConfig, word: WordEmbedding) -> None:
        super().__init__(config, config.text_decoder_layers, config.max_text_tokens + 1, config.vocab_size)
        self.word = word

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.word(ids, skip_empty_gradient=True)  # the embedder gives the table one

    def _output(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.word.weight, self.bias


class ImageDecoder(AutoregressiveDecoder):
    """Writes the dVAE's codes row by row. Begins with −1, which is no code."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.image_decoder_layers, config.num_image_codes, config.image_codebook_size)
        self.code = nn.Embedding(config.image_codebook_size + 1, config.hidden_size)  # row 0: the beginning

    begin_id = -1

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.code(ids + 1)

    def _output(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.code.weight[1:], self.bias
