"""The text decoder and the image decoder, which generate tokens and image codes from the encoder's output."""

import torch
from torch import nn

from opt_ds.config import ModelConfig
from opt_ds.nn.autoregressive import AutoregressiveDecoder
from opt_ds.nn.word_embedding import WordEmbedding


class TextDecoder(AutoregressiveDecoder):
    """Decoder of WordPieces.

    It shares the text embedder's word embedding. Texts start with [CLS] and end with [SEP].
    """

    def __init__(self, config: ModelConfig, word: WordEmbedding) -> None:
        super().__init__(config, config.text_decoder_layers, config.max_text_tokens + 1, config.vocab_size)
        self.word = word

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.word(ids, skip_empty_gradient=True)  # the embedder already gives the table a gradient

    def _output(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.word.weight, self.bias


class GridPosition(nn.Module):
    """Embedding of positions in a square grid that is read row by row: one for the row plus one for the column."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.row, self.column = nn.Embedding(side, width), nn.Embedding(side, width)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [w, e] of positions int64 [w] from 0 to side² − 1."""
        return self.row(positions // self.side) + self.column(positions % self.side)


class ImageDecoder(AutoregressiveDecoder):
    """Decoder of the dVAE's codes, row by row. The first input is −1, which is not a code.

    The position of an input is that of the code that is predicted from it.
    """

    def __init__(self, config: ModelConfig) -> None:
        is_grid = config.image_positions == "grid"
        position = GridPosition(config.image_grid_side, config.hidden_size) if is_grid else None
        super().__init__(
            config, config.image_decoder_layers, config.num_image_codes, config.image_codebook_size, position
        )
        self.code = nn.Embedding(config.image_codebook_size + 1, config.hidden_size)  # row 0 is the start

    begin_id = -1

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.code(ids + 1)

    def _output(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.code.weight[1:], self.bias
