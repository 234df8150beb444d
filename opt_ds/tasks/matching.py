"""Sample-level matching: classify from [CLS] which of text, image and audio match.

There are five matching labels: all three; image and audio; text and audio; text and image; none. A modality that does
not match comes from another sample. Modalities of other packages are dropped.

With `candidates` above 1, a sample whose input has text is read once per candidate: with its own caption and with
negatives of it (see `opt_ds.tasks.captions`). The other inputs are the same. The scores of the label that holds
for the true caption are compared by a softmax over the candidates. This label is also the one by which retrieval ranks.
Pairs of image and audio are classified as without candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from opt_ds.data.modalities import MODALITIES, TEXT
from opt_ds.data.negatives import NegativeSampler
from opt_ds.data.sample import Sample
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import OWN, BatchPart, Candidates, SampledTasks, TaskCost
from opt_ds.ops.keyed import keyed_choice, keyed_hash, keyed_uniform
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Encoded, Loss, LossTerm, Task, classification_term
from opt_ds.tasks.baselines import Baseline, TrainingStatistics
from opt_ds.tasks.caption_negatives import CaptionCandidate, CaptionKind, CaptionNegatives
from opt_ds.tasks.matching_captions import CandidateBatch, candidates_term, collate_candidates


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
    candidates: int = Field(
        1,
        ge=1,
        le=64,
        description="Captions that are compared for each sample in pre-training: the true one and hard negatives. The loss is "
        "the softmax cross-entropy of their scores. They come on top of `batch.size`. 1: each example is classified alone.",
    )
    candidate_kinds: tuple[CaptionKind, ...] = Field(
        ("swap", "replace", "caption"),
        min_length=1,
        description="Kinds of the negatives among the candidates, in turn. swap: two words of the caption are swapped. "
        "replace: a word is replaced by one of another caption. caption: another sample's caption, a hard negative with "
        "probability `hard_negative_fraction`.",
    )
    candidate_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Fraction of the samples with text in the input that have candidates. The others are classified alone, "
        "which calibrates match probabilities: candidates only rank.",
    )


@dataclass
class MatchingBatch(BatchPart):
    """Matching examples of a batch."""

    index: torch.Tensor  # int64 [j], packed positions of [CLS] of the examples that are classified alone
    labels: torch.Tensor  # int64 [j], matching labels
    candidates: CandidateBatch

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        """Return the positions of [CLS] of the matching examples."""
        return self.index, self.candidates.index


class MatchingHead(nn.Module):
    """FC to five scores.

    `bce`: sigmoid and binary cross-entropy, averaged over the five labels (as in the paper). `ce`: softmax
    cross-entropy. Candidates are compared by the score of their label; with `ce`, by its log probability.
    """

    def __init__(self, config: ModelConfig, options: MatchingConfig) -> None:
        super().__init__()
        self.score = nn.Linear(config.hidden_size, NUM_LABELS)
        self.loss = options.loss

    def forward(self, hidden_te: torch.Tensor, examples: MatchingBatch) -> dict[str, LossTerm]:
        """Return the loss term.

        It counts samples, and "correct" counts the samples whose label has the highest score, or whose true caption has
        it among the candidates.
        """
        compared = examples.candidates
        if not len(compared.index):
            scores = self.score(hidden_te.index_select(0, examples.index)).float()
            return {"matching": self._classified(scores, examples.labels)}
        scores = self.score(hidden_te.index_select(0, torch.cat([examples.index, compared.index]))).float()
        alone, scores = scores.split([len(examples.index), len(compared.index)])
        if self.loss == "ce":
            scores = scores.log_softmax(-1)
        one, other = self._classified(alone, examples.labels), candidates_term(
            scores.gather(1, compared.labels[:, None]).squeeze(1), compared
        )
        metrics = {"correct": one.metrics["correct"] + other.metrics["correct"]}
        return {"matching": LossTerm(one.sum + other.sum, one.count + other.count, metrics)}

    def _classified(self, scores: torch.Tensor, labels: torch.Tensor) -> LossTerm:
        term = classification_term(scores, labels)
        if self.loss == "bce":
            targets = F.one_hot(labels, NUM_LABELS).float()
            loss = F.binary_cross_entropy_with_logits(scores, targets, reduction="sum") / NUM_LABELS
            term = term._replace(sum=loss)
        return term


class Matching(Task):
    """Sample-level matching. `sample.targets["matching"]` is an int, the matching label, or a CaptionCandidate."""

    name = "matching"
    level = "sample"
    options = MatchingConfig
    about = "Sample-level modelling: which modalities belong together."
    losses = (Loss("matching", "matching.", about, ability=MATCH),)
    columns = {"matching_label": (np.int8, -1)}  # noqa: RUF012  # -1: not a matching example
    copies_key = "candidates"
    fine_tunes = ("retrieval",)
    fine_tuned_loss = "matching"

    # ---- the step plan

    @property
    def most_copies(self) -> int:
        """Number of negatives among the candidates."""
        return self.section.candidates - 1

    @property
    def step_columns(self) -> dict[str, tuple[type, Any]]:
        """The matching label, and what the candidates are."""
        return self.columns | CaptionNegatives.columns if self.most_copies else self.columns

    @cached_property
    def _negatives(self) -> CaptionNegatives:
        return CaptionNegatives(self.config, self.section.candidate_kinds)

    def derive(self, stores: list[FeatureStore], samples: list[np.ndarray], split: str | None) -> list[NegativeSampler]:
        """Return the negative sampler of each store.

        Hard negatives are sampled only if a complete split is given, that is in training.
        """
        hard_fraction = self.section.hard_negative_fraction if split is not None else 0.0
        if self.most_copies and split is not None:
            for store in stores:
                self._negatives.report(store)
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

    def num_copies(self, candidates: Candidates, own: np.ndarray) -> np.ndarray:
        """Return the number of negatives of samples whose caption is compared with candidates, otherwise 0."""
        return np.where(self._compares_captions(candidates, own), self.most_copies, 0)

    def _compares_captions(self, candidates: Candidates, own: np.ndarray) -> np.ndarray:
        key, present = candidates.key[own], candidates.present[own][:, MODALITIES]
        is_pair, absent = self._pairs(key, present)
        reads_text = (candidates.lengths[own, TEXT] > 0) & ~(is_pair & (absent == TEXT))
        return reads_text & (keyed_uniform(key, "captions") < self.section.candidate_fraction)

    def _pairs(self, key: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return whether the input is a pair, and the modality that is then absent, for samples bool [n, 3]."""
        complete = present.all(1)
        is_pair = ~complete | (keyed_uniform(key, "pair") < self.section.pair_probability)
        return is_pair, np.where(complete, keyed_choice(3, key, "absent"), np.argmin(present, axis=1))

    def assign(self, candidates: Candidates, sampled: SampledTasks, own: np.ndarray, derived: Any) -> None:
        """Replace and drop inputs: so that they have the sampled matching label, or for the comparison of captions."""
        if self.most_copies:
            compares = self._compares_captions(candidates, own)
            self._assign_captions(candidates, sampled, own[compares], derived)
            own = own[~compares]
        self._assign_labels(candidates, sampled, own, derived)

    def _assign_captions(self, candidates: Candidates, sampled: SampledTasks, own: np.ndarray, derived: Any) -> None:
        """Let each copy of a sample read a negative in place of the caption. The label is that of the true caption."""
        is_pair, absent = self._pairs(candidates.key[own], candidates.present[own][:, MODALITIES])
        rows = sampled.input_rows[own]
        rows[:, len(MODALITIES) :] = -1
        rows[is_pair, absent[is_pair]] = -1
        sampled.columns["matching_label"][own] = np.where(is_pair, LABEL_OF_PAIR[absent], 0)
        self._negatives.assign(candidates, sampled, own, rows, derived)
        sampled.input_rows[own] = rows

    def _assign_labels(self, candidates: Candidates, sampled: SampledTasks, own: np.ndarray, derived: Any) -> None:
        """Replace and drop inputs so that they have the sampled matching label."""
        key, present = candidates.key[own], candidates.present[own][:, MODALITIES]
        sampled_label = keyed_choice(NUM_LABELS, key, "case")  # "case" is part of the random key: do not rename it
        kept = keyed_choice(3, key, "kept")  # the modality that is kept if the label is "none"
        replaced = matching_label(sampled_label, kept)
        is_pair, absent = self._pairs(key, present)
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
        """Return the number of samples of this task. Candidates of one sample count once."""
        own = samples.task == self.number
        if self.most_copies:
            own &= samples.columns["matching_candidate"] <= 0
        return {"matching": float(own.sum())}

    def num_samples(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of terms: each sample has one."""
        return self.num_terms(samples)

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
        """Set the matching label of the sample, or its candidate. The text of a negative is made here."""
        label = int(samples.columns["matching_label"][index])
        candidate = self._negatives.candidate(sample, samples, index, store, label) if self.most_copies else None
        sample.targets[self.name] = label if candidate is None else candidate

    def collate(self, samples: Sequence[Sample], layout: Layout) -> MatchingBatch:
        """Return the matching examples."""
        examples = [i for i, sample in enumerate(samples) if isinstance(sample.targets.get(self.name), int)]
        return MatchingBatch(
            index=as_long(layout.starts[examples]),
            labels=as_long([samples[i].targets[self.name] for i in examples]),
            candidates=collate_candidates(samples, self.name, layout),
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
        """Return the loss of predicting the frequencies of the matching labels, given which modalities are present.

        All candidates of a sample are equally probable.
        """
        return _LabelFrequencies(self.section.loss, self.section.candidates)


class _LabelFrequencies(Baseline):
    """Baseline that predicts the frequency of each matching label in the validation pass, given the modalities present.

    Which modalities are present decides which labels are possible: text and audio alone match or do not.
    """

    def __init__(self, loss: str, candidates: int) -> None:
        self._loss, self._candidates = loss, candidates
        self._counts: dict[tuple[int, ...], np.ndarray] = {}
        self._compared = 0  # samples with candidates

    def add(self, sample: Sample, number: int) -> None:
        target = sample.targets.get("matching")
        if isinstance(target, CaptionCandidate):
            self._compared += target.number == 0
        elif target is not None:
            counts = self._counts.setdefault(tuple(sorted(sample.items)), np.zeros(NUM_LABELS))
            counts[target] += 1

    def losses(self) -> dict[str, float]:
        return self._mean(self._loss_of, float(np.log(self._candidates)))

    def accuracies(self) -> dict[str, float]:
        return self._mean(lambda prior: float(prior.max()), 1 / self._candidates)

    def _mean(self, of_prior: Callable[[np.ndarray], float], of_candidates: float) -> dict[str, float]:
        """Return the mean over the samples of a function of the frequencies given their modalities."""
        total = sum(counts.sum() for counts in self._counts.values()) + self._compared
        found = sum(counts.sum() * of_prior(counts / counts.sum()) for counts in self._counts.values())
        return {"matching": float((found + self._compared * of_candidates) / total)} if total else {}

    def _loss_of(self, frequencies: np.ndarray) -> float:
        prior = np.clip(frequencies, 1e-12, 1 - 1e-12)
        if self._loss == "ce":
            return float(-(prior * np.log(prior)).sum())
        return float(-(prior * np.log(prior) + (1 - prior) * np.log(1 - prior)).mean())


def _label(inputs: np.ndarray, replaced: np.ndarray) -> np.ndarray:
    """Return the matching labels [B] of inputs bool [B, M] whose modality `replaced` [B] comes from another sample."""
    inputs = inputs[:, MODALITIES]
    complete = inputs.all(1)
    pair = LABEL_OF_PAIR[np.argmin(inputs, axis=1)]
    matching = np.where(complete, 0, pair)
    return np.where(replaced < 0, matching, np.where(complete, replaced + 1, 4))
