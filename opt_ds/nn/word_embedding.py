"""Table of word embeddings that several modules share.

Legend: n ids, e width.
"""

from typing import Any

import torch
from torch import nn


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
