"""What a task is: one class in one file. The base class, the terms of a loss, and how a step's one loss is made of them.

A task says, beside what the data ask of it (`opt_ds.data.task`): its losses and their sections of the configuration, its head,
how its loss is computed from the model's output, and what a model that learned nothing would score.
"""

from abc import abstractmethod
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
    """A micro-batch's part of one loss: the fp32 sum over its terms, how many they are, and metrics over the same terms.

    A micro-batch without work gives an empty sum: 0, with a gradient of 0 for every parameter of the head.
    """

    sum: torch.Tensor
    count: float  # type: ignore[assignment]  # the field hides tuple.count
    metrics: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Loss:
    """One loss of a task."""

    name: str
    parameters: str  # beginning of the names of the parameters that only this loss trains
    about: str  # one sentence for the reference of the configuration
    settings: tuple[str, ...] = ()  # of the model, that only those parameters depend on
    ability: str | None = None  # what it teaches the model (see `opt_ds.abilities`)
    options: type[LossConfig] = LossConfig  # its section of the configuration


@dataclass(frozen=True)
class Encoded:
    """The model's output for a packed batch, and what else a task may read."""

    hidden_te: torch.Tensor  # the encoder's output; only at the positions that some task reads
    inputs: EncoderInputs
    features: Mapping[int, torch.Tensor]  # modality -> its original features, float32 [rows, v]
    decoders: Mapping[int, nn.Module]  # modality -> the decoder that writes it


class Task(DataTask):
    """A task as the model and the evaluation see it."""

    losses: ClassVar[tuple[Loss, ...]] = ()
    about: ClassVar[str]  # one sentence for the reference of the configuration
    options: ClassVar[type[LossConfig] | None] = LossConfig  # its section of the configuration; None: it has none
    is_optional: ClassVar[bool] = False  # the section may be missing, and the task's head with it
    level: ClassVar[str] = ""  # what the task decides of: "token", "modality" or "sample"; the ablation removes whole levels
    #: Parameters of the head that a BERT folder has too: our name -> BERT's names. Taken where the folder has the first one.
    bert_names: ClassVar[dict[str, tuple[str, ...]]] = {}
    #: The loss that fine-tuning trains; it is another task's where this one has none.
    fine_tuned_loss: ClassVar[str] = ""

    @classmethod
    def loss_names(cls) -> tuple[str, ...]:
        return tuple(loss.name for loss in cls.losses)

    @classmethod
    def sections(cls) -> dict[str, Any]:
        """Name -> (type, default) of the sections of the configuration that the task and its losses have."""
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
        """The task's own section."""
        return getattr(self.config.tasks, self.name)

    @classmethod
    def section_for_finetuning(
        cls, job: str, stores: list[FeatureStore], split: str, min_positives: int
    ) -> dict[str, Any] | None:
        """Return the section of a task with `is_optional` for a fine-tuning job on these stores. Raises UserError."""
        return None

    @classmethod
    def same_head(cls, section: Any, other: Any) -> bool:
        """Whether the heads of two sections of a task with `is_optional` mean the same, so that one's weights fit the other."""
        return section == other

    # ---- the model

    @classmethod
    def make_head(cls, model: ModelConfig, tasks: TasksConfig, word: nn.Embedding) -> nn.Module | None:
        """Return the task's head, which the model keeps under the task's name; None: it has none.

        word: the word embedding, which a head may share.
        """
        return None

    @classmethod
    @abstractmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        """Return every loss's term of this micro-batch. Losses without work give 0, with gradients of 0."""

    # ---- evaluation

    def baseline(self, statistics: "TrainingStatistics") -> "Baseline | None":
        """Return the loss of a model that ignores the inputs (see `opt_ds.tasks.baselines`); None: the task has none."""
        return None


def classification_term(scores: torch.Tensor, targets: torch.Tensor) -> LossTerm:
    """Summed cross-entropy of fp32 scores [m, classes] against targets [m]; counts the correct ones."""
    loss = F.cross_entropy(scores.float(), targets, reduction="sum")
    correct = (scores.detach().argmax(-1) == targets).sum().float() if len(targets) else torch.zeros((), device=scores.device)
    return LossTerm(loss, float(len(targets)), {"correct": correct})


def vocabulary_term(
    hidden_me: torch.Tensor, weight_ve: torch.Tensor, bias_v: torch.Tensor, targets: torch.Tensor
) -> LossTerm:
    """As `classification_term` of hidden · weightᵀ + bias, over so many classes that the scores are not kept."""
    loss, correct = linear_cross_entropy(hidden_me, weight_ve, bias_v, targets)
    return LossTerm(loss, float(len(targets)), {"correct": correct})


def total_loss(
    terms: dict[str, LossTerm], counts: dict[str, float], tasks: TasksConfig, world_size: int
) -> torch.Tensor:
    """Σ weight · sum · world_size / count, with `counts` over the whole global batch.

    The factor world_size undoes the mean over ranks that the gradient reduction takes; so the accumulated gradient is that of
    Σ weight · (mean over the global batch), whatever the ranks and micro-batches. A loss that is off or has count 0 counts 0.
    """
    total = torch.zeros((), device=next(iter(terms.values())).sum.device)
    for loss, term in terms.items():
        count = counts.get(loss, 0.0)
        scale = tasks.loss_weight(loss) * world_size / count if count else 0.0
        total = total + term.sum * scale
    return total
