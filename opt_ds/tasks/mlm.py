"""Masked language modelling: −log P(t_m | t_\\m, V, A) on the masked WordPieces; head tied to the word embedding."""

import torch
import torch.nn.functional as F
from torch import nn

from opt_ds.config import ModelConfig
from opt_ds.data.batch import MaskedTokens
from opt_ds.model.transformer import LayerNorm
from opt_ds.tasks.base import LossTerm, vocabulary_term


class MaskedLanguageModeling(nn.Module):
    """Dense + GELU + LN, then scores by the word embedding (BERT's head)."""

    def __init__(self, config: ModelConfig, word: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config)
        self.word = word
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def scores(self, hidden_me: torch.Tensor) -> torch.Tensor:
        """[m, e] -> [m, vocabulary]"""
        return F.linear(self._transformed(hidden_me), self.word.weight, self.bias)

    def forward(self, hidden_te: torch.Tensor, masked: MaskedTokens) -> dict[str, LossTerm]:
        hidden_me = self._transformed(hidden_te.index_select(0, masked.index))
        return {"mlm": vocabulary_term(hidden_me, self.word.weight, self.bias, masked.targets)}

    def _transformed(self, hidden_me: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.transform(hidden_me)))
