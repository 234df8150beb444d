"""Fine-tuning's classification head: a score a name from [CLS], for labels (several may hold) and for answers to a question."""

import torch
import torch.nn.functional as F
from torch import nn

from opt_ds.config import LABELS_LOSS, LabelsConfig, ModelConfig
from opt_ds.data.batch import Labelled
from opt_ds.model.transformer import LayerNorm
from opt_ds.tasks.base import LossTerm


class LabelHead(nn.Module):
    """Dense + GELU + LN, then FC to a score a name; binary cross-entropy with the targets 0 … 1, summed over the names."""

    def __init__(self, config: ModelConfig, options: LabelsConfig) -> None:
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config)
        self.score = nn.Linear(config.hidden_size, len(options.names))

    def scores(self, cls_je: torch.Tensor) -> torch.Tensor:
        """[j, e] -> [j, names], before the sigmoid"""
        return self.score(self.norm(F.gelu(self.transform(cls_je))))

    def forward(self, hidden_te: torch.Tensor, labelled: Labelled) -> dict[str, LossTerm]:
        """The term counts samples; "correct" sums the target of the name that scores most (for answers: VQA's accuracy)."""
        scores_jc = self.scores(hidden_te.index_select(0, labelled.index)).float()
        if not len(labelled.index):
            return {LABELS_LOSS: LossTerm(scores_jc.sum(), 0.0, {"correct": scores_jc.new_zeros(())})}
        loss = F.binary_cross_entropy_with_logits(scores_jc, labelled.targets, reduction="sum")
        best = labelled.targets.gather(1, scores_jc.detach().argmax(1, keepdim=True))
        return {LABELS_LOSS: LossTerm(loss, float(len(labelled.index)), {"correct": best.sum()})}
