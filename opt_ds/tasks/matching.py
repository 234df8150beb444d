"""Sample-level matching: which of text, image and audio belong together, judged from [CLS] (five cases, see data.matching)."""

import torch
import torch.nn.functional as F
from torch import nn

from opt_ds.config import MatchingConfig, ModelConfig
from opt_ds.data.batch import Judged
from opt_ds.data.matching import NUM_CASES
from opt_ds.tasks.base import LossTerm, classification_term


class Matching(nn.Module):
    """FC to five scores. `bce`: sigmoid and binary cross-entropy, averaged over the five (the paper); `ce`: softmax."""

    def __init__(self, config: ModelConfig, options: MatchingConfig) -> None:
        super().__init__()
        self.score = nn.Linear(config.hidden_size, NUM_CASES)
        self.loss = options.loss

    def forward(self, hidden_te: torch.Tensor, judged: Judged) -> dict[str, LossTerm]:
        scores = self.score(hidden_te.index_select(0, judged.index)).float()
        term = classification_term(scores, judged.cases)
        if self.loss == "bce":
            targets = F.one_hot(judged.cases, NUM_CASES).float()
            loss = F.binary_cross_entropy_with_logits(scores, targets, reduction="sum") / NUM_CASES
            term = term._replace(sum=loss)
        return {"matching": term}
