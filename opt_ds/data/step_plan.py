"""Base of all step plans: the order of samples, their lengths, the losses' counts, the micro-batches.

A step is a pure function of (config, stores, step): position p = step·B + i, epoch = p div N, sample = a keyed
permutation of (p mod N). The plan of a step is computed completely, so the counts that normalise the losses need no
communication. The subclass decides the task of a sample: `data.pretraining_plan` for pre-training, `data.finetune_plan`
for fine-tuning. The masks of a sample are decided later, by `data.samples`, from the same keys.

Legend: B samples of a step; M modalities of the model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from opt_ds.config import Config
from opt_ds.data.derived import cached_array
from opt_ds.data.flops import sample_and_step_flops
from opt_ds.data.micro_batches import MicroBatches, MicroBatchPlan, distribute
from opt_ds.data.mixing import SAMPLING_BLOCK, store_quotas
from opt_ds.data.modality import modalities_of
from opt_ds.data.step_samples import GROUP, StepSamples, concatenate, select
from opt_ds.data.store_rows import store_rows
from opt_ds.data.task import Candidates, SampledTasks, tasks_of
from opt_ds.ops.keyed import keyed_hash, permute
from opt_ds.store.reader import FeatureStore

_BLOCK = 2**18  # samples


@dataclass(frozen=True)
class StepPlan:
    """Plan of one optimiser step.

    It holds the samples, the losses' counts and divisors over the global batch, and each rank's micro-batches.
    """

    step: int
    samples: StepSamples
    counts: dict[str, float]
    divisors: dict[str, float]  # loss -> what its sum over the global batch is divided by (`tasks.reduction`)
    micro_batches: Sequence[list[MicroBatchPlan]]  # [rank][k], the same number on every rank
    num_tokens: int
    packing_efficiency: float  # used positions as a fraction of the micro-batches' budget
    load_imbalance: float  # maximum operations of a rank divided by the mean
    flops: float  # operations of training once on all its samples
    first_pass: int = 0  # number of each rank's micro-batches, from the first on, that are run twice
    num_copies: int = 0  # entries at the end of `samples` that are copies of those before them (see `DataTask.num_copies`)

    @property
    def num_samples(self) -> int:
        """Number of samples of the step. Copies do not count."""
        return len(self.samples) - self.num_copies

    def order(self, rank: int) -> list[int]:
        """Return the numbers of a rank's micro-batches in the order in which the step runs them.

        Those of the first pass come twice: first for the outputs that are compared over the whole step, then with the
        others for the gradients (see `opt_ds.tasks.global_loss`).
        """
        return [*range(self.first_pass), *range(len(self.micro_batches[rank]))]


class Plan(ABC):
    """Step plan of a run over the training split, and the fixed validation pass over the validation split."""

    VERSION = 3  # Stored in checkpoints, because a plan that samples differently must not continue an older run.
    #: Versions that this code can follow. In version 1 the text decoder also learned [SEP] after truncated texts. Up to
    #: version 2, with a batch size in tokens, the number of samples was computed for stores read in proportion to their
    #: sizes, whatever `data.store_weights`.
    VERSIONS = (1, 2, 3)
    # Task or loss -> why no sample of these stores can take it, or why the configuration disables it.
    disabled_tasks: dict[str, str]

    def __init__(self, config: Config, stores: list[FeatureStore], version: int | None = None) -> None:
        """Create the plan. `version` is that of the run that is continued, one of `VERSIONS`; None means the newest."""
        self.config, self.stores = config, stores
        self.version = self.VERSION if version is None else version
        self.modalities = modalities_of(config.model)
        self.tasks = tasks_of(config)
        self.task_names = tuple(self.tasks)  # in the order of the indices in `StepSamples.task`
        self._train = [self._usable(store, config.data.train_split) for store in stores]
        self._lengths = [[modality.lengths(store) for modality in self.modalities] for store in stores]
        self.num_samples = sum(len(rows) for rows in self._train)
        self.batch_samples = self._batch_samples()
        self._starts = np.cumsum([0, *(len(rows) for rows in self._train)])

    # ---- decided by subclasses

    def _usable(self, store: FeatureStore, split: str) -> np.ndarray:
        """Return the split's samples that the plan uses, int64."""
        return store.split_samples(split)

    @abstractmethod
    def _training_samples(self, step: int, epoch: np.ndarray, store: np.ndarray, sample: np.ndarray) -> "StepSamples":
        """Return these samples with their tasks in a training step.

        Args:
            step: Index of the step.
            epoch: int64 [B].
            store: int64 [B], indices of the stores.
            sample: int64 [B], sample indices in their stores.

        Returns:
            The samples.
        """

    @abstractmethod
    def _validation_samples(self, number: int, valid: np.ndarray) -> "list[StepSamples]":
        """Return these samples of store `number` once per task, for the validation pass."""

    # ---- steps

    def step(self, step: int, world_size: int = 1) -> "StepPlan":
        """Return the plan of optimiser step `step` (0-based). The samples do not depend on the number of ranks."""
        positions = step * self.batch_samples + np.arange(self.batch_samples, dtype=np.int64)
        samples = self._training_samples(step, *self._samples_at(positions))
        return self._step_plan(step, samples, world_size, num_samples=self.batch_samples)

    def validation(self, world_size: int = 1, max_samples: int = 2**62, chunk: int = 512) -> "list[StepPlan]":
        """Return the fixed validation pass: every trained task on every sample of the validation split.

        If there are more than `max_samples` samples in all stores, a choice that is a function of the seed is used.
        Each StepPlan holds up to `chunk` samples; its `step` is its index in the list.
        """
        samples = concatenate(self._validation_parts(max_samples))
        kept = np.flatnonzero(samples.task >= 0)
        return [
            self._step_plan(place, select(samples, part), world_size)
            for place, part in enumerate(_chunks(kept, chunk, samples.columns.get(GROUP)))
        ]

    def has_validation(self, max_samples: int = 2**62) -> bool:
        """Return whether the validation pass has any sample."""
        return any((part.task >= 0).any() for part in self._validation_parts(max_samples))

    def _validation_parts(self, max_samples: int) -> "list[StepSamples]":
        usable = [self._usable(store, self.config.data.valid_split) for store in self.stores]
        parts: list[StepSamples] = []
        for number, valid in enumerate(_chosen(usable, max_samples, self.config.seed)):
            parts += self._validation_samples(number, valid)
        return parts

    def _samples_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seed = self.config.seed
        weights = self.config.data.store_weights
        if weights is None or len(self.stores) == 1:
            epoch = positions // self.num_samples
            place = permute(positions - epoch * self.num_samples, self.num_samples, seed, "order", epoch)
            if len(self.stores) == 1:
                return epoch, np.zeros_like(place), self._train[0][place].astype(np.int64, copy=False)
            store = np.searchsorted(self._starts, place, side="right") - 1
            place = place - self._starts[store]
        else:
            epoch, store, place = self._weighted_samples_at(positions, weights)
        sample = np.empty_like(place)
        for number, rows in enumerate(self._train):
            own = self._of_store(store, number)
            sample[own] = rows[place[own]]
        return epoch, store, sample

    def _weighted_samples_at(
        self, positions: np.ndarray, weights: tuple[float, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (epoch, store, index) for positions in blocks in which each store has exactly its quota.

        Each store has its own epochs, which advance at its own pace.
        """
        quota = store_quotas(weights)
        starts = np.cumsum([0, *quota])
        block = positions // SAMPLING_BLOCK
        offset = permute(positions % SAMPLING_BLOCK, SAMPLING_BLOCK, self.config.seed, "mix", block)
        store = np.searchsorted(starts, offset, side="right") - 1
        within = block * quota[store] + offset - starts[store]
        sizes = np.diff(self._starts)[store]
        epoch, place = within // sizes, within % sizes
        for number in range(len(self.stores)):
            own = store == number
            place[own] = (
                permute(place[own], int(sizes[own][0]), self.config.seed, "order", number, epoch[own]) if own.any() else 0
            )
        return epoch, store, place

    # ---- lengths, counts, micro-batches

    def losses_of(self, samples: StepSamples, indices: np.ndarray) -> list[str]:
        """Return the active losses that have terms in the samples of a step with these indices."""
        return [loss for loss, count in self._counts(select(samples, indices)).items() if count]

    def _of_store(self, store: np.ndarray, number: int) -> np.ndarray | slice:
        """Return an index of the samples of store `number`. For a single store it is a slice, which copies nothing."""
        return slice(None) if len(self.stores) == 1 else np.flatnonzero(store == number)

    def _input_lengths(self, store: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the number of items that the model reads of these rows, int64 [B, M]."""
        return np.stack([self._lengths_of(store, rows[:, m], m) for m in range(len(self.modalities))]).T

    def _changed_lengths(self, store: np.ndarray, rows: np.ndarray, old_rows: np.ndarray, old: np.ndarray) -> np.ndarray:
        """Return `_input_lengths` of the rows, reusing the known lengths of the old rows."""
        lengths = old.copy(order="K")
        for modality in range(len(self.modalities)):
            changed = np.flatnonzero(rows[:, modality] != old_rows[:, modality])
            lengths[changed, modality] = self._lengths_of(store[changed], rows[changed, modality], modality)
        return lengths

    def _lengths_of(self, store: np.ndarray, rows: np.ndarray, modality: int) -> np.ndarray:
        """Return the number of items that the model reads of each row of this modality.

        The result is int64 [n], and 0 for absent rows.
        """
        if len(self.stores) == 1 and (rows >= 0).all():
            return self._lengths[0][modality][rows]
        lengths = np.zeros(len(rows), np.int64)
        for number, per_row in enumerate(self._lengths):
            there = np.flatnonzero((store == number) & (rows >= 0))
            lengths[there] = per_row[modality][rows[there]]
        return lengths

    def _candidates(self, key: np.ndarray, epoch: np.ndarray, store: np.ndarray, sample: np.ndarray, variant: int) -> Candidates:
        source_rows = self._source_rows(store, sample)
        return Candidates(
            stores=self.stores, lengths_by_row=self._lengths, version=self.version, key=key, epoch=epoch, store=store,
            sample=sample, source_rows=source_rows, lengths=self._input_lengths(store, source_rows),
            copy=np.zeros(len(sample), np.int64), variant=variant,
        )  # fmt: skip

    def _sampled(self, task: np.ndarray, input_rows: np.ndarray) -> SampledTasks:
        """Return the samples with their tasks, before the tasks make their decisions."""
        columns: dict[str, np.ndarray] = {
            name: np.full(len(task), fill, dtype)
            for unit in self.tasks.values()
            for name, (dtype, fill) in unit.step_columns.items()
        }
        return SampledTasks(task, input_rows, columns)

    def _samples_of(self, candidates: Candidates, sampled: SampledTasks) -> StepSamples:
        rows = sampled.input_rows
        lengths = self._changed_lengths(candidates.store, rows, candidates.source_rows, candidates.lengths)
        return StepSamples(
            epoch=candidates.epoch, store=candidates.store, sample=candidates.sample, task=sampled.task,
            source_rows=candidates.source_rows, input_rows=rows, input_lengths=lengths, columns=sampled.columns,
        )  # fmt: skip

    def _counts(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of terms of each loss over the step, summed over the tasks that compute it."""
        return self._summed(task.num_terms(samples) for task in self.tasks.values())

    def _divisors(self, samples: StepSamples, counts: dict[str, float]) -> dict[str, float]:
        """Return what the sum of each loss over the step is divided by: its items, its samples, or their geometric mean."""
        reduction = self.config.tasks.reduction
        if reduction == "item":
            return counts
        num_samples = self._summed(task.num_samples(samples) for task in self.tasks.values())
        assert all(num_samples[loss] for loss, count in counts.items() if count), "num_samples counts what num_terms counts"
        if reduction == "sample":
            return num_samples
        return {loss: math.sqrt(count * num_samples[loss]) for loss, count in counts.items()}

    def _summed(self, parts: Iterable[dict[str, float]]) -> dict[str, float]:
        """Return the sum of the tasks' numbers for each active loss."""
        total: dict[str, float] = {}
        for part in parts:
            for loss, number in part.items():
                total[loss] = total.get(loss, 0.0) + number
        return {loss: float(total[loss]) for loss in self.config.tasks.active_losses}

    def _step_plan(self, step: int, samples: StepSamples, world_size: int, num_samples: int | None = None) -> StepPlan:
        """Return the plan of a training step of `num_samples` samples, or of a chunk of the validation pass (None)."""
        costs, flops, decoder_positions = sample_and_step_flops(self.config, self.tasks.values(), samples)
        positions = samples.input_positions() + decoder_positions

        def distributed(index: np.ndarray) -> MicroBatches:
            groups = samples.columns[GROUP][index] if GROUP in samples.columns else None
            return distribute(index, positions[index], world_size, self.config.batch.max_tokens, costs[index], groups)

        in_two_passes = self._in_two_passes(samples) if num_samples is not None else np.zeros(len(samples), bool)
        first, rest = np.flatnonzero(in_two_passes), np.flatnonzero((samples.task >= 0) & ~in_two_passes)
        micro_batches, first_pass = distributed(first if len(first) else rest), 0
        if len(first):
            first_pass = len(micro_batches[0])
            micro_batches = micro_batches.followed_by(distributed(rest)) if len(rest) else micro_batches
        total, loads = int(micro_batches.num_tokens.sum()), micro_batches.loads.tolist()
        mean = sum(loads) / world_size
        budget = micro_batches.sizes.size * self.config.batch.max_tokens
        counts = self._counts(samples)
        return StepPlan(
            step, samples, counts, self._divisors(samples, counts), micro_batches, num_tokens=total,
            packing_efficiency=total / budget, load_imbalance=max(loads) / mean if mean else 1.0, flops=flops,
            first_pass=first_pass, num_copies=0 if num_samples is None else len(samples) - num_samples,
        )  # fmt: skip

    def _in_two_passes(self, samples: StepSamples) -> np.ndarray:
        """Return which samples belong to a task that takes two passes, bool [B]."""
        numbers = [task.number for task in self.tasks.values() if task.takes_two_passes]
        return np.isin(samples.task, numbers)

    def _source_rows(self, store: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """Return the samples' own rows, int64 [B, M]."""
        if len(self.stores) == 1:
            return store_rows(self.stores[0], sample, self.modalities)
        rows = np.empty((len(sample), len(self.modalities)), dtype=np.int64)
        for number, feature_store in enumerate(self.stores):
            own = self._of_store(store, number)
            rows[own] = store_rows(feature_store, sample[own], self.modalities)
        return rows

    def _batch_samples(self) -> int:
        if self.config.batch.unit == "samples":
            return self.config.batch.size
        tokens = [self._num_items(number) for number in range(len(self.stores))]
        store_weights = self.config.data.store_weights
        if store_weights is None or len(self.stores) == 1 or self.version < 3:
            mean = sum(tokens) / self.num_samples
        else:
            fractions = store_quotas(store_weights) / SAMPLING_BLOCK
            sizes = [max(1, len(samples)) for samples in self._train]
            mean = sum(
                fraction * own / size for fraction, own, size in zip(fractions.tolist(), tokens, sizes, strict=True)
            )
        return max(1, round(self.config.batch.size / (2 + mean)))

    def _num_items(self, number: int) -> float:
        """Return the total number of items that the model reads of a store's training samples.

        Computed once per store.
        """
        store, samples = self.stores[number], self._train[number]
        limits = [limit for modality in self.modalities for limit in modality.lengths_key]

        def count() -> np.ndarray:
            total = 0
            for start in range(0, len(samples), _BLOCK):
                rows = store_rows(store, samples[start : start + _BLOCK], self.modalities)
                total += int(self._input_lengths(np.full(len(rows), number), rows).sum())
            return np.array([total])

        return float(cached_array(store, "items", [*self._rows_key(self.config.data.train_split), limits], count)[0])

    def _rows_key(self, split: str) -> list[Any]:
        """Return what `_usable` depends on besides the store."""
        return [split]


def _chunks(kept: np.ndarray, size: int, groups: np.ndarray | None) -> list[np.ndarray]:
    """Return the indices `kept` in parts of up to `size`. No group (see `GROUP`) is divided."""
    if groups is None:
        return [kept[start : start + size] for start in range(0, len(kept), size)]
    own = groups[kept]
    _, first, inverse = np.unique(own, return_index=True, return_inverse=True)
    place = np.where(own < 0, np.arange(len(kept)), first[inverse])
    order = np.argsort(place, kind="stable")  # copies follow their sample
    kept, place = kept[order], place[order]
    bounds = [*np.flatnonzero(np.diff(place, prepend=-1)).tolist(), len(kept)]
    parts, begin = [], 0
    for start, end in pairwise(bounds):
        if end - begin > size and start > begin:
            parts.append(kept[begin:start])
            begin = start
    return [*parts, kept[begin:]] if len(kept) else []


def _chosen(samples: list[np.ndarray], limit: int, seed: int) -> list[np.ndarray]:
    """Return at most `limit` samples over all stores, in their order.

    The samples with the smallest hashes are chosen, so that a larger choice contains a smaller one.
    """
    if sum(map(len, samples)) <= limit:
        return samples
    keys = [keyed_hash(seed, "validation", number, own) for number, own in enumerate(samples)]
    largest = np.partition(np.concatenate(keys), limit - 1)[limit - 1]
    return [own[key <= largest] for own, key in zip(samples, keys, strict=True)]
