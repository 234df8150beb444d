"""What the step plan, the sample reader and the collator ask of a task. `opt_ds.tasks.base` adds what the model asks.

A task decides three things about a sample, each a pure function of the sample's keys:

1. in the step plan, over arrays of samples and without reading features: whether a sample allows the task, which of its inputs
   are dropped or replaced, and how much the task adds to the losses' counts and to the step's cost;
2. when the sample is read: what is masked, and the targets;
3. in a packed batch: where the model's output is used, and the targets as tensors.

Legend: B samples of a step; MODALITIES are columns 0 text, 1 image, 2 audio.
"""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from opt_ds.config import Config
from opt_ds.data.layout import Layout
from opt_ds.data.lengths import ModelLengths
from opt_ds.ops.movable import Movable
from opt_ds.data.planned_samples import PlannedSamples
from opt_ds.data.sample import Sample
from opt_ds.store.reader import FeatureStore

OWN = -1  # of `replaced`: no modality is another sample's


@dataclass
class Candidates:
    """Samples whose task is being chosen."""

    stores: list[FeatureStore]
    lengths_by_row: list[list[ModelLengths]]  # [store][modality]
    version: int  # of the step plan
    key: np.ndarray  # uint64 [B]
    epoch: np.ndarray  # int64 [B]
    store: np.ndarray  # int64 [B], index into `stores`
    sample: np.ndarray  # int64 [B], index into the store
    source_rows: np.ndarray  # int64 [B, 3], the samples' own rows; -1: not there
    lengths: np.ndarray  # int64 [B, 3], items that the model reads of them
    variant: int = 0  # of the task's variants in the validation pass (see `DataTask.num_variants`); training has variant -1

    @property
    def present(self) -> np.ndarray:
        """bool [B, 3]"""
        return self.source_rows >= 0

    def of_store(self, number: int, among: np.ndarray) -> np.ndarray:
        """int64 indices into `among` (int64 indices of samples) of the samples of store `number`."""
        return np.arange(len(among)) if len(self.stores) == 1 else np.flatnonzero(self.store[among] == number)


@dataclass
class Drawn:
    """What the tasks decide of the samples; each task changes the entries of its own samples."""

    task: np.ndarray  # int8 [B], index into the plan's tasks; -1: nothing can be learned from this sample
    input_rows: np.ndarray  # int64 [B, 3], after dropping and replacing
    columns: dict[str, np.ndarray]  # what the tasks keep, [B] each


@dataclass(frozen=True)
class TaskCost:
    """What a task adds to the samples of a step."""

    output_positions: np.ndarray  # int64 [B], positions of the encoder's output that it reads
    decoder_positions: np.ndarray  # int64 [B], positions of decoders
    decoder_flops: np.ndarray  # float64 [B], operations of a forward pass
    head_flops: np.ndarray  # float64 [B]

    @classmethod
    def none(cls, count: int) -> "TaskCost":
        return cls(np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count), np.zeros(count))


@dataclass
class BatchPart(Movable):
    """What a task needs of a packed batch. It is always there; without work its tensors have length 0."""

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        """int64 each: the packed positions of the encoder's output that the task reads."""
        return ()

    @property
    def num_decoder_positions(self) -> int:
        return 0


class DataTask(ABC):
    """A task as the data see it. Instances hold the configuration, no state."""

    name: ClassVar[str]
    sampled: ClassVar[bool] = True  # pre-training samples it by tasks.mix
    masked_modalities: ClassVar[tuple[int, ...]] = ()  # whose items are masked in the input
    #: column of the step plan -> its dtype and the value of samples of other tasks
    columns: ClassVar[dict[str, tuple[type, Any]]] = {}
    #: The fine-tuning jobs (`opt-ds finetune`) that train with this task.
    fine_tunes: ClassVar[tuple[str, ...]] = ()
    #: What a sample must have to be fine-tuned on, in words that follow its inputs.
    target_words: ClassVar[str] = ""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.number = list(config.tasks.units).index(self.name)  # in `PlannedSamples.task`

    def own(self, samples: PlannedSamples) -> np.ndarray:
        """int64, the samples of a step that were assigned to this task."""
        return np.flatnonzero(samples.task == self.number)

    @classmethod
    def loss_names(cls) -> tuple[str, ...]:
        return ()

    @property
    def active(self) -> tuple[str, ...]:
        """The task's losses that have a weight."""
        active = self.config.tasks.active_losses
        return tuple(loss for loss in self.loss_names() if loss in active)

    # ---- the step plan

    def derive(self, stores: list[FeatureStore], samples: list[np.ndarray], split: str | None) -> Any:
        """Return what the task needs of a whole split; passed on as `derived`.

        Args:
            stores: The run's stores.
            samples: int64 indices of the split's samples, of each store.
            split: The split's name where `samples` are all of its samples; None: some of them.
        """
        return None

    def disabled(self, present: np.ndarray, stores: list[FeatureStore], derived: Any) -> dict[str, str]:
        """Return why no sample of the stores can take the task or one of its losses: name -> reason.

        present: bool [subsets, 3], the subsets of modalities that occur in the training split.
        """
        return {}

    @property
    def num_variants(self) -> int:
        """How many passes over its samples the validation makes, each with another `Candidates.variant`."""
        return 1

    def possible(self, candidates: Candidates, derived: Any) -> np.ndarray:
        """bool [B]: the samples that allow the task."""
        return np.zeros(len(candidates.sample), dtype=bool)

    def assign(self, candidates: Candidates, drawn: Drawn, own: np.ndarray, derived: Any) -> None:
        """Drop and replace inputs of the task's samples (int64 indices `own`), in place, and fill in its columns."""

    def num_terms(self, samples: PlannedSamples) -> dict[str, float]:
        """Return the terms of each of the task's losses over the step: masked items, tokens to write, samples."""
        return {}

    def cost(self, samples: PlannedSamples, positions: np.ndarray) -> TaskCost:
        """Return what the task adds to each sample; `positions`: float64 [B], the encoder's."""
        return TaskCost.none(len(samples))

    # ---- fine-tuning's plan

    def has_target(self, store: FeatureStore, samples: np.ndarray) -> np.ndarray:
        """bool [n]: the samples that have what the task is to predict."""
        return np.ones(len(samples), dtype=bool)

    def derive_for_finetuning(self, stores: list[FeatureStore], usable: list[np.ndarray], key: list[Any]) -> Any:
        """As `derive`, for the samples with all inputs and a target; `key`: what they depend on besides the store."""
        return None

    def replacements(self, inputs: np.ndarray) -> tuple[int, ...]:
        """Return what is replaced, one after another, in a validation sample with these inputs (bool [3])."""
        return (OWN,)

    def chosen_replacement(self, key: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """int64 [B]: the modality of a training sample that comes from another sample; `OWN`: none. inputs: bool [B, 3]."""
        return np.full(len(key), OWN)

    def assign_for_finetuning(
        self, candidates: Candidates, drawn: Drawn, inputs: np.ndarray, replaced: np.ndarray, derived: Any
    ) -> None:
        """As `assign`, for all samples, with the inputs (bool [B, 3]) and the replacement of each."""

    # ---- a sample

    @property
    def mask_spans(self) -> dict[int, int]:
        """Modality -> how many neighbouring items are masked together, for the modalities of which this task sets that."""
        return {}

    def add_targets(self, sample: Sample, planned: PlannedSamples, slot: int, store: FeatureStore) -> None:
        """Put the targets of a sample that was assigned to this task into `sample.targets`; its inputs are read and masked."""

    # ---- a packed batch

    def collate(self, samples: Sequence[Sample], layout: Layout) -> BatchPart | None:
        """Return the part of a batch of the samples that have `targets[name]`; None: the task adds no part of its own."""
        return None
