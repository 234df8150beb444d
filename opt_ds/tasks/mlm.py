r"""Masked language modelling: −log P(t_m | t_\m, V, A) on the masked WordPieces.

The head is tied to the word embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from opt_ds.config import ModelConfig, TasksConfig
from opt_ds.data.layout import Layout, join
from opt_ds.data.modalities import TEXT
from opt_ds.data.sample import Sample, given
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import BatchPart
from opt_ds.nn.transformer import LayerNorm
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Encoded, Loss, LossTerm, vocabulary_term
from opt_ds.tasks.baselines import Baseline, SampleBaseline, TrainingStatistics
from opt_ds.tasks.token_level import TokenLevelTask, masked_places


@dataclass
class MaskedTokens(BatchPart):
    """Masked tokens of a batch."""

    index: torch.Tensor  # int64 [m], packed positions
    targets: torch.Tensor  # int64 [m], original tokens

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        """Return the positions of the masked tokens."""
        return (self.index,)


class MlmHead(nn.Module):
    """Dense + GELU + LN, then scores by the word embedding (BERT's head)."""

    def __init__(self, config: ModelConfig, word: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config)
        self.word = word
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def scores(self, hidden_me: torch.Tensor) -> torch.Tensor:
        """Return scores [m, vocabulary] of hidden states [m, e]."""
        return F.linear(self._transformed(hidden_me), self.word.weight, self.bias)

    def forward(self, hidden_te: torch.Tensor, masked: MaskedTokens) -> dict[str, LossTerm]:
        """Return the loss term of the masked tokens."""
        hidden_me = self._transformed(hidden_te.index_select(0, masked.index))
        return {"mlm": vocabulary_term(hidden_me, self.word.weight, self.bias, masked.targets)}

    def _transformed(self, hidden_me: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.transform(hidden_me)))


class MaskedLanguageModeling(TokenLevelTask):
    """Masked language modelling. `sample.targets["mlm"]` is int64 [n], the text's original tokens."""

    name = "mlm"
    about = "Masked language modelling."
    losses = (Loss("mlm", "mlm.", about),)
    modality, modality_word = TEXT, "text"
    masked_modalities = (TEXT,)
    bert_names = {  # noqa: RUF012
        "mlm.transform.weight": ("cls.predictions.transform.dense.weight",),
        "mlm.transform.bias": ("cls.predictions.transform.dense.bias",),
        "mlm.norm.weight": ("cls.predictions.transform.LayerNorm.weight",),
        "mlm.norm.bias": ("cls.predictions.transform.LayerNorm.bias",),
        "mlm.bias": ("cls.predictions.bias",),
    }

    def flops_per_item(self) -> float:
        """Return the multiplications of the transform and of the scores over the vocabulary."""
        width = self.config.model.hidden_size
        return width**2 + width * self.config.model.vocab_size

    def add_targets(self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore) -> None:
        """Set the original tokens of the sample."""
        sample.targets[self.name] = sample.of(TEXT).original

    def collate(self, samples: Sequence[Sample], layout: Layout) -> MaskedTokens:
        """Return the masked tokens and their positions."""
        places = masked_places(samples, self.name, TEXT)
        return MaskedTokens(
            index=join([layout.first[i, TEXT] + 1 + p for i, p in places], np.int64),  # [CLS] comes before them
            targets=join([samples[i].targets[self.name][p] for i, p in places], np.int64),
        )

    @classmethod
    def make_head(cls, model: ModelConfig, tasks: TasksConfig, word: nn.Embedding) -> nn.Module:
        """Return the head, which shares the word embedding."""
        return MlmHead(model, word)

    @classmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        """Return the head's term."""
        assert head is not None
        return head(encoded.hidden_te, part)

    def baseline(self, statistics: TrainingStatistics) -> Baseline:
        """Return the loss of predicting the unigram frequencies of the training texts."""

        def losses(sample: Sample, number: int) -> dict[str, np.ndarray]:
            return {"mlm": statistics.tokens[sample.targets[self.name][given(sample.of(TEXT).masked)]]}

        return SampleBaseline(self.name, losses)
