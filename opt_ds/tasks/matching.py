"""Sample-level matching: classify from [CLS] which of text, image and audio match.

There are five matching labels: all three; image and audio; text and audio; text and image; none. A modality that does
not match comes from another sample. Modalities of other packages are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from opt_ds.abilities import MATCH
from opt_ds.config import LossConfig, ModelConfig, TasksConfig
from opt_ds.data.hard_negatives import HardNegativeSampler
from opt_ds.data.layout import Layout, as_long
from opt_ds.data.matching import LABEL_OF_PAIR, NUM_LABELS, matching_label
from opt_ds.data.modalities import MODALITIES
from opt_ds.data.negatives import NegativeSampler
from opt_ds.data.sample import Sample
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import OWN, BatchPart, Candidates, SampledTasks, TaskCost
from opt_ds.ops.keyed import keyed_choice, keyed_hash, keyed_uniform
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Encoded, Loss, LossTerm, Task, classification_term
from opt_ds.tasks.baselines import Baseline, TrainingStatistics


class MatchingConfig(LossConfig):
    """Sample-level matching."""

    renamed = {  # noqa: RUF012
        "near_donor_share": "hard_negative_fraction", "near_donor_candidates": "hard_negative_candidates",
        "hard_negative_share": "hard_negative_fraction",
    }  # fmt: skip

    loss: Literal["bce", "ce"] = Field(
        "bce", description="Loss: binary cross-entropy per matching label, or cross-entropy over all labels."
    )
    pair_probability: float = Field(
        0.5, ge=0, le=1, description="Fraction of the samples whose input is two modalities, not three."
    )
    hard_negative_fraction: float = Field(
        0.0, ge=0, le=1, description="Fraction of the negatives in training that are hard negatives."
    )
    hard_negative_candidates: int = Field(
        16, ge=2, description="Candidates for each hard negative. The one with the most similar text is taken."
    )


@dataclass
class MatchingBatch(BatchPart):
    """Matching examples of a batch."""

    index: torch.Tensor  # int64 [j], packed positions of [CLS]
    labels: torch.Tensor  # int64 [j], matching labels

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        """Return the positions of [CLS] of the matching examples."""
        return (self.index,)


class MatchingHead(nn.Module):
    """FC to five scores.

    `bce`: sigmoid and binary cross-entropy, averaged over the five labels (as in the paper). `ce`: softmax
    cross-entropy.
    """

    def __init__(self, config: ModelConfig, options: MatchingConfig) -> None:
        super().__init__()
        self.score = nn.Linear(config.hidden_size, NUM_LABELS)
        self.loss = options.loss

    def forward(self, hidden_te: torch.Tensor, examples: MatchingBatch) -> dict[str, LossTerm]:
        """Return the loss term.

        It counts samples, and "correct" counts the samples whose label has the highest score.
        """
        scores = self.score(hidden_te.index_select(0, examples.index)).float()
        term = classification_term(scores, examples.labels)
        if self.loss == "bce":
            targets = F.one_hot(examples.labels, NUM_LABELS).float()
            loss = F.binary_cross_entropy_with_logits(scores, targets, reduction="sum") / NUM_LABELS
            term = term._replace(sum=loss)
        return {"matching": term}


class Matching(Task):
    """Sample-level matching. `sample.targets["matching"]` is an int, the matching label."""

    name = "matching"
    level = "sample"
    options = MatchingConfig
    about = "Sample-level modelling: which modalities belong together."
    losses = (Loss("matching", "matching.", about, ability=MATCH),)
    columns = {"matching_label": (np.int8, -1)}  # noqa: RUF012  # -1: not a matching example
    fine_tunes = ("retrieval",)
    fine_tuned_loss = "matching"

    # ---- the step plan

    def derive(self, stores: list[FeatureStore], samples: list[np.ndarray], split: str | None) -> list[NegativeSampler]:
        """Return the negative sampler of each store.

        Hard negatives are sampled only if a complete split is given, that is in training.
        """
        hard_fraction = self.section.hard_negative_fraction if split is not None else 0.0
        return [
            NegativeSampler(store, rows, split, hard_fraction, self.section.hard_negative_candidates)
            for store, rows in zip(stores, samples, strict=True)
        ]

    def disabled(self, present: np.ndarray, stores: list[FeatureStore], derived: Any) -> dict[str, str]:
        """Return a reason if no store has usable negatives."""
        if any(pool.usable for pool in derived):
            return {}
        return {self.name: "no negative: it needs two modalities, and in a split three groups that do not share a file"}

    def possible(self, candidates: Candidates, derived: Any) -> np.ndarray:
        """Return which samples have two modalities and a store with usable negatives."""
        return (candidates.present[:, MODALITIES].sum(1) >= 2) & np.array([pool.usable for pool in derived])[candidates.store]

    def assign(self, candidates: Candidates, sampled: SampledTasks, own: np.ndarray, derived: Any) -> None:
        """Replace and drop inputs so that they have the sampled matching label."""
        key, present = candidates.key[own], candidates.present[own][:, MODALITIES]
        sampled_label = keyed_choice(NUM_LABELS, key, "case")  # "case" is part of the random key: do not rename it
        kept = keyed_choice(3, key, "kept")  # the modality that is kept if the label is "none"
        replaced = matching_label(sampled_label, kept)
        complete = present.all(1)
        is_pair = ~complete | (keyed_uniform(key, "pair") < self.section.pair_probability)
        absent = np.where(complete, keyed_choice(3, key, "absent"), np.argmin(present, axis=1))
        replaced[is_pair, absent[is_pair]] = False
        pair_label = np.where(replaced.any(1), NUM_LABELS - 1, LABEL_OF_PAIR[absent])
        sampled.columns["matching_label"][own] = np.where(is_pair, pair_label, sampled_label)
        rows = sampled.input_rows[own]
        rows[:, len(MODALITIES) :] = -1
        rows[is_pair, absent[is_pair]] = -1
        for number, pool in enumerate(derived):
            of_store = candidates.of_store(number, own)
            sample = candidates.sample[own[of_store]]
            if sample.size:
                rows[of_store] = pool.replace(rows[of_store], replaced[of_store], sample, key[of_store])
        sampled.input_rows[own] = rows

    def num_terms(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of samples of this task."""
        return {"matching": float((samples.task == self.number).sum())}

    def add_cost(self, samples: StepSamples, positions: np.ndarray, total: TaskCost) -> None:
        """Add the cost of one output position and the head per sample."""
        own = self.own(samples)
        total.output_positions[own] += 1
        total.head_flops[own] += 2.0 * self.config.model.hidden_size * NUM_LABELS

    # ---- fine-tuning: the unchanged sample, or one modality replaced by that of a hard negative

    def derive_for_finetuning(
        self, stores: list[FeatureStore], usable: list[np.ndarray], key: list[Any]
    ) -> list[HardNegativeSampler]:
        """Return the hard negatives of each store."""
        options = self.config.finetune
        assert options is not None
        return [
            HardNegativeSampler(store, rows, options.negative_candidates, options.same_group_negatives, key)
            for store, rows in zip(stores, usable, strict=True)
        ]

    def replacements(self, inputs: np.ndarray) -> tuple[int, ...]:
        """Return `OWN`, then each input modality.

        Each validation sample is matched as it is and with each modality replaced.
        """
        return (OWN, *np.flatnonzero(inputs).tolist())

    def chosen_replacement(self, key: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """Return a random input modality with probability `finetune.negative_fraction`, otherwise `OWN`."""
        assert self.config.finetune is not None
        modality = np.array(MODALITIES)[None]
        order = np.argsort(keyed_hash(key[:, None], "side", modality), axis=1)
        ranked = np.where(np.take_along_axis(inputs, order, axis=1), modality, len(MODALITIES))
        side = np.take_along_axis(order, ranked.argmin(1)[:, None], axis=1)[:, 0]
        return np.where(keyed_uniform(key, "negative") < self.config.finetune.negative_fraction, side, OWN)

    def assign_for_finetuning(
        self, candidates: Candidates, sampled: SampledTasks, inputs: np.ndarray, replaced: np.ndarray, derived: Any
    ) -> None:
        """Replace the chosen modality and set the label. Samples without a suitable negative get no task."""
        for number, pool in enumerate(derived):
            own = candidates.of_store(number, np.arange(len(sampled.task)))
            sample, key = candidates.sample[own], candidates.key[own]
            sampled.input_rows[own], found = pool.replace(sampled.input_rows[own], replaced[own], sample, key)
            sampled.task[own] = np.where(found, sampled.task[own], -1)
        sampled.columns["matching_label"][:] = np.where(sampled.task >= 0, _label(inputs, replaced), -1)

    # ---- samples and batches

    def add_targets(self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore) -> None:
        """Set the matching label of the sample."""
        sample.targets[self.name] = int(samples.columns["matching_label"][index])

    def collate(self, samples: Sequence[Sample], layout: Layout) -> MatchingBatch:
        """Return the matching examples."""
        examples = [i for i, sample in enumerate(samples) if self.name in sample.targets]
        return MatchingBatch(
            as_long(layout.starts[examples]), as_long([samples[i].targets[self.name] for i in examples])
        )

    # ---- the model and its baseline

    @classmethod
    def make_head(cls, model: ModelConfig, tasks: TasksConfig, word: nn.Embedding) -> nn.Module:
        """Return the matching head."""
        return MatchingHead(model, tasks.matching)

    @classmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        """Return the head's term."""
        assert head is not None
        return head(encoded.hidden_te, part)

    def baseline(self, statistics: TrainingStatistics) -> Baseline:
        """Return the loss of predicting the frequencies of the matching labels."""
        return _LabelFrequencies(self.section.loss)


class _LabelFrequencies(Baseline):
    """Baseline that predicts the frequency of each matching label in the validation pass."""

    def __init__(self, loss: str) -> None:
        self._loss, self._counts = loss, np.zeros(NUM_LABELS)

    def add(self, sample: Sample, number: int) -> None:
        if "matching" in sample.targets:
            self._counts[sample.targets["matching"]] += 1

    def losses(self) -> dict[str, float]:
        if not self._counts.sum():
            return {}
        prior = np.clip(self._counts / self._counts.sum(), 1e-12, 1 - 1e-12)
        if self._loss == "ce":
            return {"matching": float(-(prior * np.log(prior)).sum())}
        return {"matching": float(-(prior * np.log(prior) + (1 - prior) * np.log(1 - prior)).mean())}


def _label(inputs: np.ndarray, replaced: np.ndarray) -> np.ndarray:
    """Return the matching labels [B] of inputs bool [B, M] whose modality `replaced` [B] comes from another sample."""
    inputs = inputs[:, MODALITIES]
    complete = inputs.all(1)
    pair = LABEL_OF_PAIR[np.argmin(inputs, axis=1)]
    matching = np.where(complete, 0, pair)
    return np.where(replaced < 0, matching, np.where(complete, replaced + 1, 4))
