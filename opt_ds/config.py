"""The run configuration: one frozen tree, its presets, and strict loading (file, then `--set key.path=value`).

Every other file receives a piece of this tree; nobody else holds a default. Rules that span several keys are checked here,
before anything is loaded; rules that need the store or the hardware are in `opt_ds.engine.preflight`.
"""

import copy
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from opt_ds.config_model import DataConfig, ModelConfig, Section, Subset
from opt_ds.config_sources import parse_value, read_source, set_value
from opt_ds.config_tasks import (
    CurriculumPhase,
    LossConfig,
    TasksConfig,
    TasksSection,
    default_tasks,
    plugins_of,
    tasks_config,
)
from opt_ds.errors import UserError, did_you_mean
from opt_ds.registry import TASKS
from opt_ds.user_files import expected_kind

__all__ = [
    "BatchConfig", "CheckpointConfig", "Config", "CurriculumPhase", "DataConfig", "EvaluateConfig", "FineTuneConfig",
    "GuardConfig", "InitConfig", "LossConfig", "ModelConfig", "OpsConfig", "OptimizerConfig", "ProfileConfig",
    "ScheduleConfig", "Section", "Subset", "TasksConfig", "TrainConfig", "ZeroConfig", "config_from_dict", "default_tasks",
    "dump_config", "load_config",
]  # fmt: skip


class FineTuneConfig(Section):
    """What `opt-ds finetune` trains, from which checkpoint. It also switches the other tasks off."""

    task: Literal["retrieval", "transcription", "captioning", "classification", "vqa"]
    checkpoint: str = Field(..., description="folder of the checkpoint that the weights come from")
    weights_sha256: str = Field(..., description="of that checkpoint's weights")
    learned: tuple[str, ...] = Field((), description="losses that it was trained with")
    inputs: tuple[Subset, ...] = Field(..., min_length=1, description="modalities that go in; several: drawn for each sample")
    negative_share: float = Field(0.5, gt=0, lt=1, description="retrieval: share of samples with a donor's part")
    donor_candidates: int = Field(32, ge=1, description="retrieval: donors drawn, of which the nearest text is taken")
    same_group_donors: bool = Field(
        False, description="retrieval: half of the drawn donors are of the sample's own group, with another text and image"
    )
    agreement: int = Field(
        3, ge=1, le=3, description="vqa: annotators that must agree on an answer for a target of 1; at most as many as answered"
    )


class InitConfig(Section):
    """Which run's weights a new pre-training run begins with. Written by `--init-from`; the run keeps it when it resumes."""

    run: str = Field(..., description="what --init-from named: a run's output directory, or one checkpoint")
    checkpoint: str = Field(..., description="folder of the checkpoint that the weights come from")
    weights_sha256: str = Field(..., description="of that checkpoint's weights")
    learned: tuple[str, ...] = Field((), description="losses that it was trained with; the heads of others start fresh")
    moments: bool = Field(False, description="take Adam's moments and its count of updates too")
    adam_steps: int = Field(0, ge=0, description="updates behind those moments; 0 without moments")


class BatchConfig(Section):
    size: int = Field(10240, ge=1, description="per optimiser step, over all ranks, in `unit`")
    unit: Literal["samples", "tokens"] = "samples"
    max_tokens: int = Field(8192, ge=1, description="encoder plus decoder positions of one micro-batch")


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    lr: float = Field(5e-5, gt=0)
    betas: tuple[_Decay, _Decay] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm; 0: off")


class ScheduleConfig(Section):
    total_steps: int = Field(100_000, ge=1, description="where the learning rate reaches 0")
    warmup_steps: int = Field(10_000, ge=0)

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then linear decay to 0 at total_steps; of the 0-based step about to be taken."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps))


class TrainConfig(Section):
    max_steps: int | None = Field(None, ge=1, description="stop here; None: at schedule.total_steps")
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(1000, ge=1)
    validate_samples: int = Field(2048, ge=1, description="validation samples at most")
    picture_grid: int = Field(8, ge=0, description="samples shown in the picture grid of a validation; 0: none")
    recompute: bool = Field(
        False, description="backward runs each layer again, instead of keeping what was inside: less memory, more operations"
    )
    early_stopping: int = Field(0, ge=0, description="validations without a better loss before stopping; 0: never")
    preemption_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCONT", "SIGTERM"] = Field(
        "SIGUSR1", description="beside SIGTERM and SIGINT: save, and exit with 75"
    )
    time_limit_minutes: float | None = Field(
        None, gt=0, description="of one launch; then it saves and exits with 75. None: what Slurm grants, if that is known"
    )
    time_reserve_s: float = Field(120, ge=0, description="time for saving, kept free before the limit beside the longest step")


class ProfileConfig(Section):
    """A trace by torch's profiler, under <output>/profile."""

    steps: int = Field(0, ge=0, description="steps to trace; 0: none")
    skip: int = Field(2, ge=0, description="steps of this launch before the first traced one")


class CheckpointConfig(Section):
    every_steps: int = Field(1000, ge=1)
    keep: int = Field(2, ge=1)


class GuardConfig(Section):
    """When a run warns, skips a step, or stops; see `opt_ds.engine.guard`."""

    skip_budget: int = Field(3, ge=0, description="steps that are not finite and may be skipped, per skip_window")
    skip_window: int = Field(1000, ge=1, description="steps")
    spike_zscore: float = Field(8.0, ge=0, description="warn of a loss or gradient norm so far above its mean; 0: never")
    spike_window: int = Field(100, ge=20, description="steps that the mean and deviation are taken over")
    skip_spikes: bool = Field(False, description="do not take a step whose loss is a spike (it counts to skip_budget)")
    compare_ranks_every: int = Field(100, ge=0, description="steps between comparisons of the ranks' weights; 0: never")
    rank_timeout_s: float = Field(1800.0, gt=0, description="a rank that answers no collective for so long is lost")
    compare_calls_s: float = Field(
        20.0, gt=0, description="a rank that has called no collective for so long compares its calls with the other ranks'"
    )


class ZeroConfig(Section):
    stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False


class EvaluateConfig(Section):
    """Experiments on the model in training: JSON lines and TensorBoard."""

    every_steps: int = Field(0, ge=0, description="and at the end of the run; 0: never")
    experiments: tuple[Literal["retrieval", "transcription", "captioning", "image-generation", "vqa"], ...] = (
        "transcription", "retrieval",
    )  # fmt: skip
    split: str = Field("valid", description="of the first store")
    limit: int = Field(200, ge=2, description="samples of an experiment at most, a seeded choice")


class OpsConfig(Section):
    backend: str = Field("auto", description="fused operators: auto, or a name that opt_ds.ops.backend knows")


class Config(Section):
    """Everything that a run depends on, besides the stores' contents and the number of ranks."""

    preset: str = "opt-base"
    seed: int = Field(1, ge=0, lt=2**63)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    deepspeed_config: str | None = Field(None, description="a DeepSpeed JSON to take further settings from")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    tasks: TasksSection = Field(default_factory=default_tasks)
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    zero: ZeroConfig = ZeroConfig()
    ops: OpsConfig = OpsConfig()
    profile: ProfileConfig = ProfileConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    finetune: FineTuneConfig | None = Field(None, description="set by opt-ds finetune")
    init: InitConfig | None = Field(None, description="set by pretrain.py --init-from")

    @property
    def learned_losses(self) -> tuple[str, ...]:
        """What the model was trained with, by this run or by those that its weights come from."""
        before = (*(self.finetune.learned if self.finetune else ()), *(self.init.learned if self.init else ()))
        return tuple(loss for loss in self.tasks.all_losses if loss in before or loss in self.tasks.trained_losses)

    def can(self, ability: str) -> bool:
        """Whether the model was trained with the loss that teaches this ability (see `opt_ds.abilities`)."""
        return self.tasks.loss_for(ability) in self.learned_losses

    @property
    def max_steps(self) -> int:
        return self.train.max_steps or self.schedule.total_steps

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        if self.schedule.warmup_steps >= self.schedule.total_steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} is not below schedule.total_steps "
                f"{self.schedule.total_steps}"
            )
        if self.precision == "fp16" and self.zero.stage == 0:
            raise ValueError(
                "precision fp16 with zero.stage 0 trains wrongly in DeepSpeed (the loss is not scaled, the gradient is "
                "unscaled): use zero.stage=1"
            )
        if self.evaluate.every_steps and self.zero.stage == 3:
            raise ValueError(
                "evaluate.every_steps runs the model on each rank alone, which zero.stage 3 does not allow: use a lower stage, "
                "or evaluate the checkpoints"
            )
        if self.data.mix is not None and len(self.data.mix) != len(self.data.stores):
            raise ValueError(f"data.mix has {len(self.data.mix)} weights for {len(self.data.stores)} stores")
        if self.data.mix is not None and min(self.data.mix) <= 0:
            raise ValueError("data.mix must hold positive weights")
        decoder = max(self.model.max_text_tokens + 1, 0) + self.model.num_image_codes
        if self.batch.max_tokens < self.model.max_sequence + decoder:
            raise ValueError(
                f"batch.max_tokens {self.batch.max_tokens} cannot hold the longest sample of "
                f"{self.model.max_sequence + decoder} positions (text, regions, frames and what the decoders write): raise it"
            )
        return self


def load_config(source: str | None = None, settings: tuple[str, ...] | list[str] = ()) -> Config:
    """Build the configuration from a preset's name or a YAML file, then `key.path=value` settings (YAML values).

    A file may name a `preset` to start from. Raises UserError, one line, for an unknown preset, key or a bad value.
    """
    tree, where = read_source(source or "opt-base"), f"config {source or 'opt-base'}"
    return config_from_dict(tree, where, settings, trusted=True)


def config_from_dict(
    tree: dict[str, Any], where: str, settings: tuple[str, ...] | list[str] = (), trusted: bool = False
) -> Config:
    """Validate a plain tree (as YAML holds it), with settings laid over it.

    Args:
        tree: The tree.
        where: What messages call its source.
        settings: `key.path=value`, values as in YAML.
        trusted: The user gave the tree in this command, so the tasks that it names by `module:Class` may be imported.

    Raises:
        UserError: For an unknown key or a bad value; names `where`, the key and the remedy.
    """
    tree = copy.deepcopy(tree)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f'--set "{setting}": write it as key.path=value')
        set_value(tree, key.strip().split("."), parse_value(key, value))
    if trusted:
        TASKS.allow(plugins_of(tree.get("tasks")))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, tasks_config(plugins_of(tree.get('tasks'))))}") from None


def dump_config(config: Config) -> str:
    """The whole tree as YAML; `load_config` of it gives an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _explain(error: ValidationError, tasks: type[TasksConfig]) -> str:
    """One line for the first mistake; the others are counted."""
    mistakes = error.errors(include_url=False)
    first = mistakes[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f'unknown key "{key}"{did_you_mean(str(first["loc"][-1]), _known_keys(first["loc"][:-1], tasks))}'
    else:
        message = expected_kind(first["type"]) or first["msg"]
        text = f"{key}: {message}" if key else message
        text = text.replace("Value error, ", "")
        if key and not isinstance(first["input"], (dict, BaseModel)):
            text += f" (found {first['input']!r})"
    return text + (f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else "")


def _known_keys(location: tuple[Any, ...], tasks: type[TasksConfig]) -> list[str]:
    section: Any = Config
    for part in location:
        section = section.model_fields[part].annotation if part in getattr(section, "model_fields", {}) else None
        section = tasks if section is TasksConfig else section
    return list(getattr(section, "model_fields", {}))
