"""Alignment: contrast between separate encodings of a sample's modalities, over all samples of a step.

The encoder reads each modality of a sample alone: its text, its image, its audio, and its text with its audio. These are
the sample's *views*. [CLS] of a view is projected into a space that all views share, and normalised. A pair of views of one
sample must be more similar than a view of it and one of any other sample of the step.

- **In the step plan**, each view is a sequence of its own, with its own global sample index, in any micro-batch of any rank.
- **The loss** compares all views of the step, whatever the ranks, the micro-batches and ZeRO's stage. This takes two passes
  over their micro-batches; `tasks.global_loss` describes them, and `tasks.contrast` the loss itself.
- **The mean** is over the samples of the task. Each pair of views that a sample has gets an equal part of its weight.
- **Negatives.** Samples with equal texts (as the model reads them), with the same image or with the same audio are not
  negatives of each other. Images and audio are compared by their rows in the store.
- **Validation** compares all samples of the validation pass. The baseline is uniform over the candidates.

The task is off, without a head, unless `tasks.alignment` is a section and has a sampling weight.

Legend: v views of a step, j views of a micro-batch, d width of the shared space.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from opt_ds.abilities import ALIGN
from opt_ds.config import LossConfig, ModelConfig, TasksConfig
from opt_ds.data.layout import Layout, as_long
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.data.step_samples import StepSamples, concatenate
from opt_ds.data.task import BatchPart, Candidates, SampledTasks, TaskCost
from opt_ds.ops.movable import Movable
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Encoded, Loss, LossTerm, Task
from opt_ds.tasks.baselines import Baseline, TrainingStatistics
from opt_ds.tasks.contrast import LOG_SCALE_LIMIT, Pair, Temperature, contrast
from opt_ds.tasks.global_loss import GlobalLoss, SumOverRanks
from opt_ds.tasks.views import (
    NUMBER_OF_VIEW,
    PAIRS,
    VIEW_NAMES,
    VIEWS,
    needed_views,
    rows_of_views,
    views_of_pairs,
    views_of_rows,
)


class AlignmentConfig(LossConfig):
    """Alignment."""

    loss: Literal["infonce", "sigmoid"] = Field(
        "infonce",
        description="Loss: softmax over the candidates in both directions, or a sigmoid per pair with a learned bias.",
    )
    pairs: tuple[Literal["image_text", "audio_text", "image_audio", "text_audio_image"], ...] = Field(
        ("image_text", "audio_text", "image_audio", "text_audio_image"),
        min_length=1,
        description="Pairs of views that are contrasted.",
    )
    width: int = Field(256, ge=1, description="Width of the shared space.")
    temperature: float = Field(
        0.07, ge=0.01, description="Initial temperature of the scores. It is learned; 0.01 is its lower limit."
    )
    bias: float = Field(-10.0, description="Initial bias of the sigmoid loss. It is learned.")


class AlignmentTarget(NamedTuple):
    """What the collator and the baseline read of a view."""

    view: int  # index into VIEWS
    keys: tuple[int, int, int]  # identifiers of the text, image and audio of its sample; 0: absent


@dataclass
class CachedGradient(Movable):
    """A micro-batch's part of the loss over the whole step."""

    of_embeddings: torch.Tensor  # float32 [j, d]
    of_temperature: Temperature
    term: LossTerm  # the value and the metrics


@dataclass
class AlignmentBatch(BatchPart):
    """Views of a batch, grouped by view in the order of VIEWS."""

    index: torch.Tensor  # int64 [j], packed positions of [CLS]
    keys: torch.Tensor  # int64 [j, 3], see `AlignmentTarget`
    sizes: tuple[int, ...]  # number of sequences per view
    sample_index: np.ndarray  # int64 [j], global sample indices
    cached: CachedGradient | None = None  # set for the second pass

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        """Return the positions of [CLS] of the views."""
        return (self.index,)


class AlignmentHead(nn.Module):
    """One projection per view into the shared space, and the temperature (and bias) of the loss."""

    def __init__(self, config: ModelConfig, options: AlignmentConfig) -> None:
        super().__init__()
        self.projections = nn.ModuleDict(
            {view: nn.Linear(config.hidden_size, options.width) for view in views_of_pairs(options.pairs)}
        )
        self.log_scale = nn.Parameter(torch.tensor([-math.log(options.temperature)]))
        self.bias = nn.Parameter(torch.tensor([options.bias])) if options.loss == "sigmoid" else None

    def embed(self, cls_je: torch.Tensor, view: str) -> torch.Tensor:
        """Return normalised embeddings, float32 [j, d], of [CLS] vectors of a view."""
        return F.normalize(self.projections[view](cls_je).float(), dim=-1)

    def forward(self, hidden_te: torch.Tensor, views: AlignmentBatch) -> dict[str, LossTerm]:
        """Return the term of a micro-batch.

        Without cached gradients its value and gradients are 0, and the embeddings and the temperature are in `shared`.
        """
        cls_je = hidden_te.index_select(0, views.index)
        parts = dict(zip(VIEWS, cls_je.split(views.sizes), strict=True))
        embeddings = torch.cat([self.embed(parts[view], view) for view in self.projections])
        log_scale = self.log_scale.float()
        bias = self.bias.float() if self.bias is not None else torch.zeros_like(log_scale)
        if views.cached is None:
            nothing = embeddings.sum() * 0 + log_scale.sum() * 0 + bias.sum() * 0
            zero = torch.zeros((), device=hidden_te.device)
            metrics = {"correct": zero, "chance": zero, "scale": zero}
            shared = (embeddings.detach(), log_scale.detach().clone(), bias.detach().clone())
            return {"alignment": LossTerm(nothing, 0.0, metrics, shared)}
        of_scale, of_bias = views.cached.of_temperature
        linear = (embeddings * views.cached.of_embeddings).sum() + (log_scale * of_scale).sum() + (bias * of_bias).sum()
        term = views.cached.term
        return {"alignment": term._replace(sum=linear - linear.detach() + term.sum)}


class Alignment(Task):
    """Alignment. `sample.targets["alignment"]` is an `AlignmentTarget`, for each view of a sample."""

    name = "alignment"
    level = "sample"
    options = AlignmentConfig
    is_optional = True
    about = "Alignment of separate encodings of text, image and audio over the whole batch. None: no head."
    losses = (Loss("alignment", "alignment.", about, ability=ALIGN),)
    takes_two_passes = True
    copies_share_batch = False

    # ---- the step plan

    def disabled(self, present: np.ndarray, stores: list[FeatureStore], derived: Any) -> dict[str, str]:
        """Return a reason if no sample has both views of a pair."""
        if needed_views(present, self.section.pairs).any():
            return {}
        return {self.name: "no sample has both views of a pair in tasks.alignment.pairs"}

    def possible(self, candidates: Candidates, derived: Any) -> np.ndarray:
        """Return which samples have both views of a pair."""
        return np.asarray(self._needed(candidates, np.arange(len(candidates.sample))).any(1))

    @property
    def most_copies(self) -> int:
        """Number of views besides the first."""
        return len(VIEWS) - 1 if self.is_configured else 0

    def num_copies(self, candidates: Candidates, own: np.ndarray) -> np.ndarray:
        """Return one copy for each view besides the first."""
        return self._needed(candidates, own).sum(1) - 1

    def assign(self, candidates: Candidates, sampled: SampledTasks, own: np.ndarray, derived: Any) -> None:
        """Let each sample and each of its copies read another view."""
        needed = self._needed(candidates, own)
        is_own = needed & (needed.cumsum(1) - 1 == candidates.copy[own, None])
        sampled.input_rows[own] = rows_of_views(candidates.source_rows[own], is_own.argmax(1))

    def _needed(self, candidates: Candidates, own: np.ndarray) -> np.ndarray:
        """Return which views of these samples are encoded, bool [n, views]."""
        return needed_views(candidates.lengths[own] > 0, self.section.pairs)

    def num_terms(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of samples of this task, each of which has several views."""
        return {self.name: float(_sample_numbers(samples, self.own(samples))[1])}

    def num_samples(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of terms: each sample has one."""
        return self.num_terms(samples)

    def add_cost(self, samples: StepSamples, positions: np.ndarray, total: TaskCost) -> None:
        """Add the cost of one output position and a projection per view."""
        own = self.own(samples)
        if own.size:
            total.output_positions[own] += 1
            total.head_flops[own] += 2.0 * self.config.model.hidden_size * self.section.width

    # ---- samples and batches

    def add_targets(self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore) -> None:
        """Set the view and the identifiers of the content of its sample."""
        rows, number = samples.source_rows[index], int(samples.store[index])
        text = self._text_key(store, int(rows[TEXT]))
        image, audio = ((number << 40) + int(rows[m]) + 1 if rows[m] >= 0 else 0 for m in (IMAGE, AUDIO))
        sample.targets[self.name] = AlignmentTarget(NUMBER_OF_VIEW[frozenset(sample.items)], (text, image, audio))

    def _text_key(self, store: FeatureStore, row: int) -> int:
        """Return a 64-bit hash of the tokens of a text that the model reads, or 0 if there is none."""
        tokens = np.asarray(store.text(row) if row >= 0 else (), np.int64)[: self.config.model.max_text_tokens]
        if not len(tokens):
            return 0
        return int.from_bytes(blake2b(tokens.tobytes(), digest_size=8).digest(), "little", signed=True)

    def collate(self, samples: Sequence[Sample], layout: Layout) -> AlignmentBatch | None:
        """Return the views, or None without a `tasks.alignment` section."""
        if not self.is_configured:
            return None
        views = [(sample.targets[self.name], i) for i, sample in enumerate(samples) if self.name in sample.targets]
        views.sort(key=lambda view: (view[0].view, view[1]))
        places = [i for _, i in views]
        return AlignmentBatch(
            index=as_long(layout.starts[places]),
            keys=torch.tensor([target.keys for target, _ in views], dtype=torch.int64).view(-1, 3),
            sizes=tuple(sum(target.view == number for target, _ in views) for number in range(len(VIEWS))),
            sample_index=np.array([samples[i].index for i in places], dtype=np.int64),
        )

    # ---- the model and its baseline

    @classmethod
    def same_head(cls, section: Any, other: Any) -> bool:
        """Return whether both sections exist and describe the same parameters."""
        if not (section and other):
            return False
        one, two = ((own.loss, own.width, views_of_pairs(own.pairs)) for own in (section, other))
        return one == two

    @classmethod
    def make_head(cls, model: ModelConfig, tasks: TasksConfig, word: nn.Embedding) -> nn.Module | None:
        """Return the head, or None without a `tasks.alignment` section."""
        return AlignmentHead(model, tasks.alignment) if tasks.alignment else None

    @classmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        """Return the head's term."""
        assert head is not None
        return head(encoded.hidden_te, part)

    def global_loss(self, device: torch.device) -> "AlignmentLoss":
        """Return the loss over all views of a step."""
        return AlignmentLoss(self, device)

    def baseline(self, statistics: TrainingStatistics) -> Baseline | None:
        """Return the loss of scoring all candidates alike."""
        return _AllAlike(self.section) if self.is_configured else None


class AlignmentLoss(GlobalLoss):
    """The contrast of all views of a step, or of a validation pass."""

    def __init__(self, task: Alignment, device: torch.device) -> None:
        self._task, self._device = task, device
        self._chunks: list[StepSamples] = []
        self._own: list[np.ndarray] = []  # the views of each chunk, int64, ascending
        self._outputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # rows, embeddings and keys
        self._temperature: Temperature | None = None

    def begin(self, samples: StepSamples) -> None:
        """Expect the views of these samples."""
        self._chunks.append(samples)
        self._own.append(self._task.own(samples))

    def add(self, part: BatchPart, terms: dict[str, LossTerm]) -> None:
        """Keep the embeddings of a micro-batch."""
        views = cast(AlignmentBatch, part)
        embeddings, *temperature = terms[self._task.name].shared
        self._temperature = Temperature(*temperature)
        if len(embeddings):
            self._outputs.append((self._rows_of(views), embeddings, views.keys))

    def _rows_of(self, views: AlignmentBatch) -> torch.Tensor:
        """Return the rows of the table of a micro-batch of the last chunk, int64 [j]."""
        before = sum(map(len, self._own[:-1]))
        return torch.from_numpy(before + np.searchsorted(self._own[-1], views.sample_index)).to(self._device)

    def combine(self, sum_over_ranks: SumOverRanks, with_gradient: bool) -> dict[str, LossTerm]:
        """Gather the embeddings of all ranks, and compute the loss over all of them on every rank."""
        num_views = sum(map(len, self._own))
        if not num_views:
            zero = torch.zeros((), device=self._device)
            return {self._task.name: LossTerm(zero, 0.0, {"correct": zero})}
        assert self._temperature is not None, "a rank runs at least one micro-batch, which may be empty"
        width = self._task.section.width
        table = self._gathered([(rows, part) for rows, part, _ in self._outputs], width, torch.float32, sum_over_ranks)
        keys = self._gathered([(rows, part) for rows, _, part in self._outputs], 3, torch.int64, sum_over_ranks)
        self._outputs.clear()
        pairs, num_samples = self._pairs()
        options = self._task.section
        found = contrast(table, keys, pairs, self._temperature, options.loss, with_gradient)
        scale = self._temperature.log_scale.sum().clamp_max(LOG_SCALE_LIMIT).exp()
        metrics = {"correct": found.correct, "chance": found.chance, "scale": scale * num_samples}
        self._term = LossTerm(found.loss, float(num_samples), metrics)
        self._gradient, self._of_temperature = found.of_table, found.of_temperature
        return {self._task.name: self._term}

    def _gathered(
        self, parts: list[tuple[torch.Tensor, torch.Tensor]], width: int, dtype: torch.dtype, sum_over_ranks: SumOverRanks
    ) -> torch.Tensor:
        """Return the rows of all ranks, [v, width]. Each rank has 0 in the rows of the others, so the sum is exact."""
        table = torch.zeros(sum(map(len, self._own)), width, dtype=dtype, device=self._device)
        for rows, part in parts:
            table[rows] = part.to(dtype)
        return sum_over_ranks(table).to(self._device)

    def _pairs(self) -> tuple[list[Pair], int]:
        """Return the rows of each pair of views, and the number of samples."""
        numbers, num_samples = _sample_numbers(
            concatenate(self._chunks) if len(self._chunks) > 1 else self._chunks[0],
            np.concatenate([own + start for own, start in zip(self._own, self._starts(), strict=True)]),
        )
        views = np.concatenate([views_of_rows(chunk.input_rows[own]) for chunk, own in zip(self._chunks, self._own, strict=True)])
        row_of = np.full((num_samples, len(VIEWS)), -1)
        row_of[numbers, views] = np.arange(len(views))
        chosen = [tuple(VIEW_NAMES.index(view) for view in PAIRS[pair]) for pair in PAIRS if pair in self._task.section.pairs]
        has = np.array([(row_of[:, pair] >= 0).all(1) for pair in chosen])  # [pairs, samples]
        weight = 1.0 / np.maximum(1, has.sum(0))
        found = []
        for pair, there in zip(chosen, has, strict=True):
            first, second = row_of[there][:, pair].T
            weights = torch.from_numpy(weight[there].astype(np.float32)).to(self._device)
            found.append(Pair(as_long(first).to(self._device), as_long(second).to(self._device), weights))
        return found, num_samples

    def _starts(self) -> list[int]:
        return np.cumsum([0, *(len(chunk) for chunk in self._chunks[:-1])]).tolist()

    def cached(self, part: BatchPart) -> BatchPart:
        """Return the micro-batch's views with their gradients and their part of the loss.

        The loss's value, and the gradient of the temperature, are divided equally over the views of the step.
        """
        views = cast(AlignmentBatch, part)
        fraction = len(views.index) / len(self._gradient)
        term = self._term
        own = LossTerm(
            term.sum * fraction, term.count * fraction, {name: value * fraction for name, value in term.metrics.items()}
        )
        of_temperature = Temperature(*(value * fraction for value in self._of_temperature))
        return replace(views, cached=CachedGradient(self._gradient[self._rows_of(views)], of_temperature, own))


class _AllAlike(Baseline):
    """Baseline that scores all candidates alike, with the best bias where there is one."""

    def __init__(self, options: AlignmentConfig) -> None:
        self._options = options
        self._views: dict[tuple[int, str], set[str]] = {}  # store and sample -> its views
        self._keys: dict[tuple[int, str], tuple[int, int, int]] = {}

    def add(self, sample: Sample, number: int) -> None:
        if "alignment" in sample.targets:
            target, name = sample.targets["alignment"], (number, sample.name)
            self._views.setdefault(name, set()).add(VIEW_NAMES[target.view])
            self._keys[name] = target.keys

    def losses(self) -> dict[str, float]:
        return self._mean(self._loss_of)

    def accuracies(self) -> dict[str, float]:
        return self._mean(lambda candidates: 1.0 / candidates)

    def _loss_of(self, candidates: np.ndarray) -> np.ndarray:
        if self._options.loss == "infonce":
            return np.log(candidates)
        others = candidates - 1  # the best constant probability of a match is 1 / candidates
        return np.log(candidates) + others * np.log(candidates / np.maximum(1, others))

    def _mean(self, value: Any) -> dict[str, float]:
        """Return the mean over samples, and over the pairs of each, of a function of the number of candidates."""
        per_sample: dict[tuple[int, str], list[float]] = {}
        for pair in self._options.pairs:
            names = [name for name, views in self._views.items() if views.issuperset(PAIRS[pair])]
            keys = np.array([self._keys[name] for name in names], dtype=np.int64).reshape(-1, 3)
            for place, name in enumerate(names):
                shares_content = ((keys == keys[place]) & (keys != 0)).any(1)
                candidates = np.array(len(names) - shares_content.sum() + 1)  # its own other view is a candidate
                per_sample.setdefault(name, []).append(float(value(candidates)))
        return {"alignment": float(np.mean([np.mean(own) for own in per_sample.values()]))} if per_sample else {}


def _sample_numbers(samples: StepSamples, own: np.ndarray) -> tuple[np.ndarray, int]:
    """Return a number per sample for each of these views, int64 [v], and the number of samples."""
    keys = np.stack([samples.epoch[own], samples.store[own], samples.sample[own]])
    order = np.lexsort(keys)
    is_first = np.concatenate([[True], (np.diff(keys[:, order], axis=1) != 0).any(0)])[: len(own)]
    numbers = np.empty(len(own), np.int64)
    numbers[order] = np.cumsum(is_first) - 1
    return numbers, int(is_first.sum())
