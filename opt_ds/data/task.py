"""Interface of a task to the step plan, the sample reader and the collator.

`opt_ds.tasks.base` adds the model's side.

A task decides three things about a sample, each as a pure function of the sample's keys:

1. In the step plan, over arrays of samples and without reading features: whether a sample allows the task, which of its
  inputs are dropped or replaced, and how much the task adds to the losses' counts and to the step's cost.
2. When the sample is read: what is masked, and the targets.
3. In a packed batch: which positions of the model's output are used, and the targets as tensors.

Legend: B samples of a step; M modalities of the model, of which columns 0, 1 and 2 are text, image and audio.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from opt_ds.config import Config
from opt_ds.data.layout import Layout
from opt_ds.data.lengths import ModelLengths
from opt_ds.data.sample import Sample
from opt_ds.data.step_samples import StepSamples
from opt_ds.ops.movable import Movable
from opt_ds.store.reader import FeatureStore

OWN = -1  # value of `replaced`: no modality comes from another sample


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
    source_rows: np.ndarray  # int64 [B, M], the samples' own rows; -1: absent
    lengths: np.ndarray  # int64 [B, M], number of items that the model reads
    copy: np.ndarray  # int64 [B], 0: the sample itself, 1, 2, …: its copies (see `DataTask.num_copies`)
    variant: int = 0  # Variant of the task in the validation pass (see `DataTask.num_variants`); -1 in training.

    @cached_property
    def present(self) -> np.ndarray:
        """Which modalities are present, bool [B, M]."""
        return self.source_rows >= 0

    def with_copies(self, copies: np.ndarray) -> tuple["Candidates", np.ndarray]:
        """Append `copies` [B] copies of each sample. Return the candidates, and the index of each among the old ones."""
        origin = np.repeat(np.arange(len(copies)), copies)
        number = np.arange(len(origin)) - np.repeat(np.cumsum(copies) - copies, copies) + 1
        index = np.concatenate([np.arange(len(copies)), origin])
        arrays = {name: getattr(self, name)[index] for name in ("key", "epoch", "store", "sample", "source_rows", "lengths")}
        return replace(self, **arrays, copy=np.concatenate([np.zeros_like(copies), number])), index

    def of_store(self, number: int, among: np.ndarray) -> np.ndarray | slice:
        """Return an index into `among` (int64 sample indices) of the samples of store `number`.

        It is a slice, which copies nothing, for a run's only store.
        """
        return slice(None) if len(self.stores) == 1 else np.flatnonzero(self.store[among] == number)


@dataclass
class SampledTasks:
    """Decisions of the tasks about the samples. Each task changes the entries of its own samples."""

    task: np.ndarray  # int8 [B], index into the plan's tasks; -1: no task can use this sample
    input_rows: np.ndarray  # int64 [B, M], after dropping and replacing
    columns: dict[str, np.ndarray]  # columns of the tasks, [B] each


@dataclass(frozen=True)
class TaskCost:
    """Cost of a step's samples, to which each task adds its own."""

    output_positions: np.ndarray  # int64 [B], positions of the encoder's output that a task reads
    decoder_positions: np.ndarray  # int64 [B], positions of decoders
    decoder_flops: np.ndarray  # float64 [B], operations of a forward pass
    head_flops: np.ndarray  # float64 [B]

    @classmethod
    def none(cls, count: int) -> "TaskCost":
        """Return zero cost for `count` samples."""
        return cls(np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count), np.zeros(count))


@dataclass
class BatchPart(Movable):
    """A task's part of a packed batch. It is always present; without work its tensors have length 0."""

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        """Packed positions of the encoder's output that a task reads, int64 tensors."""
        return ()

    @property
    def num_decoder_positions(self) -> int:
        """Number of decoder positions."""
        return 0


class DataTask:
    """A task as the data pipeline sees it. Instances hold the configuration and no state."""

    name: ClassVar[str]
    sampled: ClassVar[bool] = True  # whether pre-training samples the task by tasks.sampling_weights
    #: Whether its loss compares the samples of all micro-batches, which takes two passes (see `tasks.global_loss`).
    takes_two_passes: ClassVar[bool] = False
    masked_modalities: ClassVar[tuple[int, ...]] = ()  # modalities whose items are masked in the input
    #: Column of the step plan -> its dtype and its value for samples of other tasks.
    columns: ClassVar[dict[str, tuple[type, Any]]] = {}
    #: Key of the task's section that gives its samples copies. "": they never have any.
    copies_key: ClassVar[str] = ""
    #: Whether a sample and its copies must be in one micro-batch.
    copies_share_batch: ClassVar[bool] = True
    #: The fine-tuning jobs (`opt-ds finetune`) that train with this task.
    fine_tunes: ClassVar[tuple[str, ...]] = ()
    #: What a sample must have for fine-tuning, as words that follow its inputs in a message.
    target_words: ClassVar[str] = ""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.number = list(config.tasks.units).index(self.name)  # value in `StepSamples.task`

    def own(self, samples: StepSamples) -> np.ndarray:
        """Return the samples of a step that were assigned to this task, int64."""
        return np.flatnonzero(samples.task == self.number)

    @classmethod
    def loss_names(cls) -> tuple[str, ...]:
        """Return the names of the task's losses."""
        return ()

    @property
    def is_configured(self) -> bool:
        """Whether the task has its section of the configuration, which only an optional task may lack."""
        return getattr(self.config.tasks, self.name, self) is not None

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the task's losses with a positive weight."""
        active = self.config.tasks.active_losses
        return tuple(loss for loss in self.loss_names() if loss in active)

    # ---- the step plan

    def derive(self, stores: list[FeatureStore], samples: list[np.ndarray], split: str | None) -> Any:
        """Return what the task derives from a complete split; it is passed on as `derived`.

        Args:
            stores: The run's stores.
            samples: int64 indices of the split's samples, per store.
            split: Name of the split if `samples` are all of its samples. None: some of them.

        Returns:
            Any object, or None.
        """
        return None

    def disabled(self, present: np.ndarray, stores: list[FeatureStore], derived: Any) -> dict[str, str]:
        """Return name -> reason for the task or those of its losses that no sample of the stores can take.

        `present` is bool [subsets, M], the subsets of modalities that occur in the training split.
        """
        return {}

    @property
    def num_variants(self) -> int:
        """Number of validation passes over the task's samples, each with another `Candidates.variant`."""
        return 1

    def possible(self, candidates: Candidates, derived: Any) -> np.ndarray:
        """Return which samples allow the task, bool [B]."""
        return np.zeros(len(candidates.sample), dtype=bool)

    @property
    def most_copies(self) -> int:
        """Largest number of copies of a sample. 0: the task reads each sample once."""
        return 0

    @property
    def step_columns(self) -> dict[str, tuple[type, Any]]:
        """`columns`, and those that the task has only with some settings."""
        return self.columns

    def num_copies(self, candidates: Candidates, own: np.ndarray) -> np.ndarray:
        """Return how many copies the step has of each own sample, int64 [n].

        A task that compares several inputs of one sample assigns different inputs to the sample and its copies
        (`Candidates.copy`). Copies come on top of the batch size.
        """
        return np.zeros(len(own), np.int64)

    def assign(self, candidates: Candidates, sampled: SampledTasks, own: np.ndarray, derived: Any) -> None:
        """Drop and replace inputs of the task's samples in place, and set its columns.

        Args:
            candidates: The samples of the step.
            sampled: The decisions, which are changed.
            own: int64 indices of the task's samples.
            derived: The result of `derive`.
        """

    def num_terms(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of terms of each of the task's losses over the step.

        Terms are masked items, target tokens or samples.
        """
        return {}

    def num_samples(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of samples with terms of each of the task's losses over the step. Copies do not count.

        A task whose samples may lack terms of a loss overrides this.
        """
        return dict.fromkeys(self.loss_names(), float((samples.task == self.number).sum()))

    def add_cost(self, samples: StepSamples, positions: np.ndarray, total: TaskCost) -> None:
        """Add the task's cost of each sample to `total`, in place. `positions` are the encoder's, float64 [B]."""

    # ---- the fine-tuning plan

    def has_target(self, store: FeatureStore, samples: np.ndarray) -> np.ndarray:
        """Return which samples have what the task predicts, bool [n]."""
        return np.ones(len(samples), dtype=bool)

    def derive_for_finetuning(self, stores: list[FeatureStore], usable: list[np.ndarray], key: list[Any]) -> Any:
        """Return `derive` for the samples that have all inputs and a target.

        `key` is what they depend on besides the store.
        """
        return None

    def replacements(self, inputs: np.ndarray) -> tuple[int, ...]:
        """Return the modalities that are replaced, one per pass, in a validation sample.

        `inputs` is bool [M].
        """
        return (OWN,)

    def chosen_replacement(self, key: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """Return the modality of each training sample that comes from another sample, or `OWN`, int64 [B].

        `inputs` is bool [B, M].
        """
        return np.full(len(key), OWN)

    def assign_for_finetuning(
        self, candidates: Candidates, sampled: SampledTasks, inputs: np.ndarray, replaced: np.ndarray, derived: Any
    ) -> None:
        """Replace inputs and set columns, as `assign`, for all samples.

        Args:
            candidates: The samples of the step.
            sampled: The decisions, which are changed.
            inputs: bool [B, M], the inputs of each sample.
            replaced: int64 [B], the modality that comes from another sample, or `OWN`.
            derived: The result of `derive_for_finetuning`.
        """

    # ---- samples

    @property
    def mask_spans(self) -> dict[int, int]:
        """Modality -> number of neighbouring items that are masked together.

        Only modalities that this task configures are included.
        """
        return {}

    def add_targets(self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore) -> None:
        """Set the targets of a sample of this task in `sample.targets`. Its inputs are already read and masked.

        Args:
            sample: The sample, which is changed.
            samples: The samples of the step.
            index: Global sample index.
            store: The sample's store.
        """

    # ---- packed batches

    def collate(self, samples: Sequence[Sample], layout: Layout) -> BatchPart | None:
        """Return the task's part of a batch, from the samples that have `targets[name]`.

        Return None if the task adds no part.
        """
        return None


def tasks_of(config: Config) -> dict[str, DataTask]:
    """Return name -> task of a configuration, in the order of `StepSamples.task`."""
    return {name: unit(config) for name, unit in config.tasks.units.items()}
