"""Base class of tasks (one class per file), the terms of a loss, and the total loss of a step.

Besides the data side (`opt_ds.data.task`), a task defines its losses and their configuration sections, its head, how
its loss is computed from the model's output, and the loss of a trivial baseline.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from opt_ds.config import LossConfig, ModelConfig, TasksConfig
from opt_ds.data.batch import EncoderInputs
from opt_ds.data.task import BatchPart, DataTask
from opt_ds.ops.linear_cross_entropy import linear_cross_entropy
from opt_ds.store.reader import FeatureStore

if TYPE_CHECKING:
    from opt_ds.tasks.baselines import Baseline, TrainingStatistics


class LossTerm(NamedTuple):
    """A micro-batch's part of one loss: the fp32 sum over its terms, their number, and metrics over the same terms.

    A micro-batch without work has an empty sum: 0, with a gradient of 0 for every parameter of the head.
    """

    sum: torch.Tensor
    count: float  # type: ignore[assignment]  # the field hides tuple.count
    metrics: dict[str, torch.Tensor]
    shared: tuple[torch.Tensor, ...] = ()  # outputs that are compared over the whole step (see `tasks.global_loss`)


@dataclass(frozen=True)
class Loss:
    """One loss of a task."""

    name: str
    parameters: str  # name prefix of the parameters that only this loss trains
    about: str  # one sentence for the configuration reference
    settings: tuple[str, ...] = ()  # settings of the model that affect only those parameters
    ability: str | None = None  # what the loss teaches the model (see `opt_ds.abilities`)
    options: type[LossConfig] = LossConfig  # its configuration section


@dataclass(frozen=True)
class Encoded:
    """The model's output for a packed batch, and further tensors that tasks may read."""

    hidden_te: torch.Tensor  # the encoder's output, only at the positions that some task reads
    inputs: EncoderInputs
    features: Mapping[int, torch.Tensor]  # modality -> original features, float32 [rows, v]
    decoders: Mapping[int, nn.Module]  # modality -> the decoder that generates it


class Task(DataTask, ABC):
    """A task as the model and the evaluation see it."""

    losses: ClassVar[tuple[Loss, ...]] = ()
    about: ClassVar[str]  # one sentence for the configuration reference
    options: ClassVar[type[LossConfig] | None] = LossConfig  # its configuration section; None: it has none
    is_optional: ClassVar[bool] = False  # whether the section, and with it the task's head, may be missing
    level: ClassVar[str] = ""  # scope of the task: "token", "modality" or "sample"; the ablation removes whole levels
    #: Parameters of the head that a BERT folder also has: our name -> BERT's names. They are loaded if the folder has
    #: the first name.
    bert_names: ClassVar[dict[str, tuple[str, ...]]] = {}
    #: The loss that fine-tuning trains. It belongs to another task if this one has no loss.
    fine_tuned_loss: ClassVar[str] = ""

    @classmethod
    def loss_names(cls) -> tuple[str, ...]:
        """Return the names of the task's losses."""
        return tuple(loss.name for loss in cls.losses)

    @classmethod
    def sections(cls) -> dict[str, Any]:
        """Return name -> (type, default) of the configuration sections of the task and its losses."""
        found: dict[str, Any] = {}
        if cls.options is not None and cls.is_optional:
            found[cls.name] = (cls.options | None, Field(None, description=cls.about))
        elif cls.options is not None:
            found[cls.name] = (cls.options, Field(cls.options(), description=cls.about))
        for loss in cls.losses:
            found.setdefault(loss.name, (loss.options, Field(loss.options(), description=loss.about)))
        return found

    @property
    def section(self) -> Any:
        """The task's own configuration section."""
        return getattr(self.config.tasks, self.name)

    @classmethod
    def section_for_finetuning(
        cls, job: str, stores: list[FeatureStore], split: str, min_positives: int
    ) -> dict[str, Any] | None:
        """Return the section of an optional task (`is_optional`) for a fine-tuning job.

        Args:
            job: Name of the fine-tuning job.
            stores: The stores to fine-tune on.
            split: The training split.
            min_positives: Minimum number of training samples per label.

        Returns:
            The section's settings, or None if the task has no section of its own.

        Raises:
            UserError: The stores lack what the job requires.
        """
        return None

    @classmethod
    def same_head(cls, section: Any, other: Any) -> bool:
        """Return whether two sections of an optional task describe the same head.

        If they do, the weights of one fit the other.
        """
        return section == other

    # ---- the model

    @classmethod
    def make_head(cls, model: ModelConfig, tasks: TasksConfig, word: nn.Embedding) -> nn.Module | None:
        """Return the task's head, or None if it has none. The model stores it under the task's name.

        `word` is the word embedding, which a head may share.
        """
        return None

    @classmethod
    @abstractmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        """Return the term of every loss for this micro-batch. Losses without work return 0, with gradients of 0."""

    def global_loss(self, device: torch.device) -> Any:
        """Return the task's `tasks.global_loss.GlobalLoss`, if it takes two passes (`takes_two_passes`)."""
        raise NotImplementedError(f"{self.name} compares no samples across micro-batches")

    # ---- evaluation

    def baseline(self, statistics: "TrainingStatistics") -> "Baseline | None":
        """Return the loss of a model that ignores the inputs, or None if the task has none.

        See `opt_ds.tasks.baselines`.
        """
        return None


def classification_term(scores: torch.Tensor, targets: torch.Tensor) -> LossTerm:
    """Return the summed cross-entropy of fp32 scores [m, classes] and targets [m].

    The metric "correct" is the number of correct predictions.
    """
    loss = F.cross_entropy(scores.float(), targets, reduction="sum")
    correct = (scores.detach().argmax(-1) == targets).sum().float() if len(targets) else torch.zeros((), device=scores.device)
    return LossTerm(loss, float(len(targets)), {"correct": correct})


def vocabulary_term(
    hidden_me: torch.Tensor, weight_ve: torch.Tensor, bias_v: torch.Tensor, targets: torch.Tensor
) -> LossTerm:
    """Return `classification_term` of hidden · weightᵀ + bias for many classes, without storing all scores.

    Args:
        hidden_me: Head's hidden states [m, e].
        weight_ve: Class weights [classes, e].
        bias_v: Class biases [classes].
        targets: int64 [m].

    Returns:
        The term, with the number of correct predictions.
    """
    loss, correct = linear_cross_entropy(hidden_me, weight_ve, bias_v, targets)
    return LossTerm(loss, float(len(targets)), {"correct": correct})


def total_loss(
    terms: dict[str, LossTerm], divisors: dict[str, float], tasks: TasksConfig, world_size: int
) -> torch.Tensor:
    """Return Σ weight · sum · world_size / divisor.

    The gradient reduction averages over ranks; the factor world_size undoes this. The accumulated gradient is therefore
    that of Σ weight · (sum over the global batch) / divisor, for any number of ranks and micro-batches. A disabled loss
    and a loss with divisor 0 contribute 0.

    Args:
        terms: The micro-batch's terms per loss.
        divisors: Loss -> divisor of its sum over the whole global batch (`StepPlan.divisors`): by default the number of
            its terms.
        tasks: The configuration of the tasks, with the losses' weights.
        world_size: Number of ranks.

    Returns:
        A scalar tensor.
    """
    total = torch.zeros((), device=next(iter(terms.values())).sum.device)
    for loss, term in terms.items():
        divisor = divisors.get(loss, 0.0)
        scale = tasks.loss_weight(loss) * world_size / divisor if divisor else 0.0
        total = total + term.sum * scale
    return total
