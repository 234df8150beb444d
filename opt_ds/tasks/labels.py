"""Classification head of fine-tuning: one score per name from [CLS], for labels (several may apply) and for answers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from opt_ds.abilities import LABEL
from opt_ds.config import LossConfig, ModelConfig, TasksConfig
from opt_ds.data.layout import Layout, as_long
from opt_ds.data.sample import Sample
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import BatchPart, TaskCost
from opt_ds.errors import UserError
from opt_ds.nn.transformer import LayerNorm
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Encoded, Loss, LossTerm, Task
from opt_ds.tasks.baselines import Baseline, SampleBaseline, TrainingStatistics


class LabelsConfig(LossConfig):
    """Fine-tuning's classification head on [CLS], a score for each name."""

    names: tuple[str, ...] = Field(..., min_length=1, description="Names of the classes.")
    answers: bool = Field(
        False,
        description="Whether the labels are VQA answers, whose target is min(times given / `finetune.agreement`, 1).",
    )


@dataclass
class LabelBatch(BatchPart):
    """Classification targets of a batch."""

    index: torch.Tensor  # int64 [j], packed positions of [CLS]
    targets: torch.Tensor  # float32 [j, c], 0 … 1 for each name of the label head; [0, 0] if no sample is labelled

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        """Return the positions of [CLS] of the labelled samples."""
        return (self.index,)


class LabelHead(nn.Module):
    """Dense + GELU + LN, then FC to one score per name.

    The loss is the binary cross-entropy with targets 0 … 1, summed over the names.
    """

    def __init__(self, config: ModelConfig, options: LabelsConfig) -> None:
        super().__init__()
        self.names, self.answers = options.names, options.answers
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config)
        self.score = nn.Linear(config.hidden_size, len(options.names))

    def scores(self, cls_je: torch.Tensor) -> torch.Tensor:
        """Return logits [j, names] of [CLS] vectors [j, e]."""
        return self.score(self.norm(F.gelu(self.transform(cls_je))))

    def forward(self, hidden_te: torch.Tensor, labelled: LabelBatch) -> dict[str, LossTerm]:
        """Return the loss term. It counts samples.

        "correct" sums the target of the name with the highest score, which for answers is the VQA accuracy.
        """
        scores_jc = self.scores(hidden_te.index_select(0, labelled.index)).float()
        if not len(labelled.index):
            return {"labels": LossTerm(scores_jc.sum(), 0.0, {"correct": scores_jc.new_zeros(())})}
        loss = F.binary_cross_entropy_with_logits(scores_jc, labelled.targets, reduction="sum")
        best = labelled.targets.gather(1, scores_jc.detach().argmax(1, keepdim=True))
        return {"labels": LossTerm(loss, float(len(labelled.index)), {"correct": best.sum()})}


class LabelPrediction(Task):
    """Label prediction. `sample.targets["labels"]` is float32 [names] with values 0 … 1."""

    name = "labels"
    options = LabelsConfig
    is_optional = True
    about = "Classification head. Set by `opt-ds finetune` for classification and vqa. None: no head."
    losses = (Loss("labels", "labels.", about, ability=LABEL),)
    sampled = False
    fine_tunes = ("classification", "vqa")
    fine_tuned_loss = "labels"
    target_words = " and labels"

    @classmethod
    def section_for_finetuning(
        cls, job: str, stores: list[FeatureStore], split: str, min_positives: int
    ) -> dict[str, Any] | None:
        """Return the section with the names of the head.

        They are the labels with at least `min_positives` samples in the split, or all answers of the stores.
        """
        names = sorted({name for store in stores for name in store.description.label_names})
        if job == "classification":
            found = Counter(
                name for store in stores for index in store.split_samples(split) for name in set(store.labels(int(index)))
            )
            names = [name for name in names if found[name] >= min_positives]
        if not names:
            raise UserError(
                f"{stores[0].path}: no label has {min_positives} samples of split {split}: prepare the store with `labels` in "
                "the manifest (opt-ds import vqa writes answers there), or lower --min-positives"
            )
        return {"names": names, "answers": job == "vqa"}

    @classmethod
    def same_head(cls, section: Any, other: Any) -> bool:
        """Return whether both sections exist and have the same names."""
        return bool(section and other and section.names == other.names)

    def has_target(self, store: FeatureStore, samples: np.ndarray) -> np.ndarray:
        """Return which samples have labels."""
        return np.array([bool(store.labels(int(index))) for index in samples], dtype=bool)

    def num_terms(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of samples of this task."""
        return {"labels": float((samples.task == self.number).sum())}

    def add_cost(self, samples: StepSamples, positions: np.ndarray, total: TaskCost) -> None:
        """Add the cost of one output position and the head per sample."""
        own, width = self.own(samples), self.config.model.hidden_size
        num_names = len(self.section.names) if self.section else 0
        total.output_positions[own] += 1
        total.head_flops[own] += 2.0 * (width**2 + width * num_names)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.section.names)}

    def label_targets(self, store: FeatureStore, index: int) -> np.ndarray:
        """Return float32 [names of the label head], which is 1 for a sample's labels.

        For answers the value is min(times given / 3, 1) (Antol et al. 2015). If fewer than three annotators answered
        each question, their number replaces the 3.
        """
        labels = self.section
        assert labels is not None, "the model has no label head"
        times = np.zeros(len(labels.names), dtype=np.float32)
        for name in store.labels(index):
            if name in self._places:
                times[self._places[name]] += 1
        agreement = self.config.finetune.agreement if self.config.finetune else 3
        return np.minimum(times / (agreement if labels.answers else 1), 1)

    def add_targets(self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore) -> None:
        """Set the label targets of the sample."""
        sample.targets[self.name] = self.label_targets(store, int(samples.sample[index]))

    def collate(self, samples: Sequence[Sample], layout: Layout) -> LabelBatch:
        """Return the targets of the labelled samples."""
        labelled = [i for i, sample in enumerate(samples) if self.name in sample.targets]
        targets = np.stack([samples[i].targets[self.name] for i in labelled]) if labelled else np.empty((0, 0))
        return LabelBatch(as_long(layout.starts[labelled]), torch.from_numpy(targets.astype(np.float32)))

    @classmethod
    def make_head(cls, model: ModelConfig, tasks: TasksConfig, word: nn.Embedding) -> nn.Module | None:
        """Return the label head, or None without a `tasks.labels` section."""
        return LabelHead(model, tasks.labels) if tasks.labels else None

    @classmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        """Return the head's term, or none without a head."""
        return head(encoded.hidden_te, part) if head is not None else {}

    def baseline(self, statistics: TrainingStatistics) -> Baseline | None:
        """Return the loss of predicting each label's training frequency."""
        if self.section is None:
            return None
        frequencies = statistics.mean_of_labelled(self.label_targets)

        def losses(sample: Sample, number: int) -> dict[str, Any]:
            targets = sample.targets[self.name]
            loss = -(targets * np.log(frequencies) + (1 - targets) * np.log(1 - frequencies)).sum()
            return {"labels": np.array([float(loss)])}

        return SampleBaseline(self.name, losses)
