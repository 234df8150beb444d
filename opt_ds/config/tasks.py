"""Section `tasks`: which tasks a run trains. Its subsections are defined by the tasks (see `opt_ds.tasks.base`).

`TasksConfig` holds what is common to all tasks. Each task and each of its losses adds a section of its own name, such
as `tasks.matching`. The class that validates a configuration is therefore composed of `TasksConfig` and the tasks that
it names.
"""

from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, WrapValidator, create_model, model_validator

from opt_ds.config.plugins import plugins_of
from opt_ds.config.section import Section
from opt_ds.errors import did_you_mean
from opt_ds.registry import TASKS


class LossConfig(Section):
    """What every task and every loss can set."""

    weight: float = Field(1.0, ge=0, description="Factor on this loss in the total. 0: disabled.")


class CurriculumPhase(Section):
    """Other weights of the tasks from some point of the schedule on."""

    renamed = {"mix": "sampling_weights"}  # noqa: RUF012

    from_fraction: float = Field(
        ..., gt=0, lt=1, description="Start of the phase, as a fraction of `schedule.total_steps`."
    )
    sampling_weights: dict[str, float] = Field(
        ..., description="Task sampling weights from then on, as in `tasks.sampling_weights`."
    )


class TasksConfig(Section):
    """The tasks. A loss's weight is its own times its task's; a task without a weighted loss is disabled."""

    renamed = {"mix": "sampling_weights"}  # noqa: RUF012
    #: Name -> class of the tasks whose sections this class has.
    units: ClassVar[dict[str, Any]] = {}

    plugins: tuple[str, ...] = Field(
        (),
        description="Tasks of other packages: names that an installed package announces (entry points `opt_ds.tasks`), or "
        "`module:Class`.",
    )
    sampling_weights: dict[str, float] = Field(
        default_factory=dict,
        description="Task sampling weights: how often a sample is used for each task. Tasks that are not named have weight 0.",
    )
    curriculum: tuple[CurriculumPhase, ...] = Field(
        (),
        description="Phases that replace `tasks.sampling_weights` from a fraction of the schedule on, in ascending "
        "order.",
    )
    reduction: Literal["item", "root", "sample"] = Field(
        "item",
        description="What a loss is summed over and divided by. item: the mean over all items of the batch (tokens, regions, "
        "frames, image codes), as in the paper. sample: the sum over the items of a sample, averaged over samples, which is "
        "the log likelihood of a sample. root: between both, the sum divided by the root of items times samples, which makes "
        "the gradients of independent items equally large.",
    )
    mask_probability: float = Field(
        0.15, gt=0, lt=1, description="Fraction of tokens, regions and frames that the masked tasks mask."
    )

    if TYPE_CHECKING:  # the tasks' sections, as in `config.tasks.matching`

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def class_for(cls, values: Any) -> type[Section]:
        """Return the class with the sections of the tasks that the values name."""
        return tasks_config(plugins_of(values))

    @classmethod
    def trust(cls, values: Any) -> None:
        """Allow the import of tasks that the user names by `module:Class`."""
        TASKS.allow(plugins_of(values))

    @property
    def sampled(self) -> dict[str, tuple[str, ...]]:
        """Task -> its losses, for the tasks that pre-training samples."""
        return {name: unit.loss_names() for name, unit in self.units.items() if unit.sampled}

    @property
    def all_losses(self) -> tuple[str, ...]:
        """All losses that this model can have, in the order of the tasks."""
        return tuple(loss for unit in self.units.values() for loss in unit.loss_names())

    def loss_for(self, ability: str) -> str:
        """Return the loss that teaches an ability (see `opt_ds.abilities`)."""
        return next(loss.name for unit in self.units.values() for loss in unit.losses if loss.ability == ability)

    def loss_weight(self, loss: str) -> float:
        """Return the weight of one of `all_losses` in the total."""
        task = next(name for name, unit in self.units.items() if loss in unit.loss_names())
        own, of_task = getattr(self, loss), getattr(self, task)
        if own is None or of_task is None:
            return 0.0
        return own.weight if task == loss else own.weight * of_task.weight

    @property
    def active_losses(self) -> tuple[str, ...]:
        """Losses with a positive weight."""
        return tuple(loss for loss in self.all_losses if self.loss_weight(loss) > 0)

    @property
    def sampled_losses(self) -> tuple[str, ...]:
        """The active losses whose task is sampled in some phase of the schedule.

        Active losses of tasks that are not sampled are included.
        """
        phases = (self.sampling_weights, *(phase.sampling_weights for phase in self.curriculum))
        largest = {task: max(weights.get(task, 0.0) for weights in phases) for task in self.sampled}
        of_loss = {loss: largest[task] for task, losses in self.sampled.items() for loss in losses}
        return tuple(loss for loss in self.active_losses if of_loss.get(loss, 1.0) > 0)

    def sampling_weights_at(self, fraction: float) -> dict[str, float]:
        """Return the task sampling weights at this fraction of the schedule.

        They sum to 1; tasks without a weighted loss have 0.
        """
        given = self.sampling_weights
        for phase in self.curriculum:
            if fraction >= phase.from_fraction:
                given = phase.sampling_weights
        active = self.active_losses
        weights = {
            task: given.get(task, 0.0) if any(loss in active for loss in losses) else 0.0
            for task, losses in self.sampled.items()
        }
        total = sum(weights.values())
        return {task: weight / total for task, weight in weights.items()} if total else weights

    @model_validator(mode="after")
    def _something_to_learn(self) -> "TasksConfig":
        if not self.units:  # a class with the common keys only
            return self
        phases = [("tasks.curriculum", phase.sampling_weights) for phase in self.curriculum]
        for name, weights in [("tasks.sampling_weights", self.sampling_weights), *phases]:
            for task, weight in weights.items():
                if task not in self.sampled:
                    raise ValueError(f'{name} names no task "{task}"{did_you_mean(task, self.sampled)}')
                if weight < 0:
                    raise ValueError(f"{name}.{task} is {weight}: a weight cannot be negative")
        starts = [phase.from_fraction for phase in self.curriculum]
        if starts != sorted(starts):
            raise ValueError("tasks.curriculum must be in the order of from_fraction")
        for fraction in (0.0, *starts):
            if not self._has_unsampled and not any(self.sampling_weights_at(fraction).values()):
                raise ValueError(
                    "no task is enabled: give one a positive weight in tasks.sampling_weights and a positive weight of "
                    "its own"
                )
        return self

    @property
    def _has_unsampled(self) -> bool:
        """Whether a task that needs no sampling weight (one of fine-tuning) is trained."""
        sampled = {loss for losses in self.sampled.values() for loss in losses}
        return any(loss not in sampled for loss in self.active_losses)


@cache
def tasks_config(plugins: tuple[str, ...]) -> type[TasksConfig]:
    """Return the class with the sections of the built-in tasks and of these plugins.

    Raise UserError if one cannot be loaded.
    """
    units = TASKS.units(plugins)
    sections: dict[str, Any] = {}
    for unit in units.values():
        sections |= unit.sections()
    sampled = [name for name, unit in units.items() if unit.sampled and not unit.is_optional]
    description = TasksConfig.model_fields["sampling_weights"].description
    weights = Field(default_factory=lambda: dict.fromkeys(sampled, 1.0), description=description)
    sections["sampling_weights"] = (dict[str, float], weights)
    made = create_model("TasksConfig", __base__=TasksConfig, __doc__=TasksConfig.__doc__, **sections)
    made.units = units
    return made


def _with_sections(value: Any, _: Any, info: ValidationInfo) -> TasksConfig:
    if isinstance(value, TasksConfig):
        return value
    return tasks_config(plugins_of(value)).model_validate(value, context=info.context)


#: Type of the section in the run's configuration.
TasksSection = Annotated[SerializeAsAny[TasksConfig], WrapValidator(_with_sections)]


def default_tasks() -> TasksConfig:
    """Return the section with the built-in tasks and all defaults."""
    return tasks_config(())()
