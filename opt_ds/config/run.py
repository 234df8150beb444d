"""Configuration of a pre-training or fine-tuning run: one frozen tree of sections, its presets and its loading.

All other code receives a section of this tree, and only this tree holds defaults. Rules that span several keys are
checked here, before anything is loaded. Rules that depend on the store or the hardware are in
`opt_ds.training.preflight`. `docs/configuration.md` lists every key.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opt_ds.config.model import STANDARD_LIMIT, DataConfig, ModelConfig, ModelSection, Subset
from opt_ds.config.section import Section, dump_section, load_section, section_from_dict
from opt_ds.config.sources import PRESET_FOLDER
from opt_ds.config.tasks import CurriculumPhase, LossConfig, TasksConfig, TasksSection, default_tasks

__all__ = [
    "STANDARD_LIMIT", "BatchConfig", "CheckpointConfig", "Config", "CurriculumPhase", "DataConfig", "EvaluateConfig",
    "FineTuneConfig", "GuardConfig", "InitConfig", "LossConfig", "ModelConfig", "OpsConfig", "OptimizerConfig", "ProfileConfig",
    "ScheduleConfig", "Section", "Subset", "TasksConfig", "TrainConfig", "ZeroConfig", "config_from_dict", "default_tasks",
    "dump_config", "load_config",
]  # fmt: skip


class FineTuneConfig(Section):
    """What `opt-ds finetune` trains, from which checkpoint. It also disables the other tasks."""

    renamed = {  # noqa: RUF012
        "donor_candidates": "negative_candidates", "same_group_donors": "same_group_negatives",
        "learned": "trained_losses", "negative_share": "negative_fraction",
    }  # fmt: skip

    task: Literal["retrieval", "transcription", "captioning", "classification", "vqa"] = Field(
        ..., description="The task that is fine-tuned."
    )
    checkpoint: str = Field(..., description="Folder of the checkpoint that the initial weights come from.")
    weights_sha256: str = Field(..., description="SHA-256 of that checkpoint's weights.")
    trained_losses: tuple[str, ...] = Field((), description="Losses that the checkpoint was trained with.")
    untrained: bool = Field(
        False,
        description="Start from random weights instead of the checkpoint's: the control of a fine-tuned model.",
    )
    inputs: tuple[Subset, ...] = Field(
        ...,
        min_length=1,
        description="Modalities of the input: T text, I image, A audio. With several entries, one is sampled for "
        "each sample.",
    )
    negative_fraction: float = Field(0.5, gt=0, lt=1, description="Retrieval: fraction of samples that are negatives.")
    negative_candidates: int = Field(
        32,
        ge=1,
        description="Retrieval: samples that are candidates for a negative. The one with the most similar text "
        "is taken.",
    )
    same_group_negatives: bool = Field(
        False,
        description="Retrieval: take half of the candidates from the sample's own group, with a different text "
        "and image.",
    )
    agreement: int = Field(
        3,
        ge=1,
        le=3,
        description="VQA: number of annotators that must give an answer for a target of 1. Fewer give a "
        "proportional target.",
    )


class InitConfig(Section):
    """Initial weights of a pre-training run. Written by `--init-from`; a resumed run keeps it."""

    renamed = {"learned": "trained_losses"}  # noqa: RUF012

    run: str = Field(..., description="What `--init-from` named: a run's output directory, or one checkpoint.")
    checkpoint: str = Field(..., description="Folder of the checkpoint that the initial weights come from.")
    weights_sha256: str = Field(..., description="SHA-256 of that checkpoint's weights.")
    trained_losses: tuple[str, ...] = Field(
        (), description="Losses that the checkpoint was trained with. The heads of all other losses start untrained."
    )
    moments: bool = Field(False, description="Also take Adam's moments and number of updates from the checkpoint.")
    adam_steps: int = Field(0, ge=0, description="Number of updates behind those moments. 0: without moments.")


class BatchConfig(Section):
    """How much data one optimizer step and one micro-batch take."""

    size: int = Field(10240, ge=1, description="Batch size of one optimizer step over all ranks, in `batch.unit`.")
    unit: Literal["samples", "tokens"] = Field(
        "samples", description="What `batch.size` counts: samples, or sequence positions."
    )
    max_tokens: int = Field(
        8192,
        ge=1,
        description="Largest micro-batch of one rank, in encoder plus decoder positions. It bounds memory and "
        "does not change "
        "the result of a step.",
    )


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW and gradient clipping."""

    lr: float = Field(5e-5, gt=0, description="Peak learning rate, reached at the end of the warm-up.")
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.98), description="Decay rates of Adam's first and second moment.")
    eps: float = Field(1e-8, gt=0, description="Term added to Adam's denominator.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay. 0: none.")
    clip_norm: float = Field(
        1.0, ge=0, description="Largest global gradient norm; larger gradients are scaled down. 0: no clipping."
    )


class ScheduleConfig(Section):
    """Learning rate over time: linear warm-up, then linear decay to 0."""

    total_steps: int = Field(100_000, ge=1, description="Optimizer step at which the learning rate reaches 0.")
    warmup_steps: int = Field(10_000, ge=0, description="Optimizer steps of the linear warm-up. 0: no warm-up.")

    def lr_factor(self, step: int) -> float:
        """Return the factor on the peak learning rate at step `step` (0-based).

        It is a linear warm-up, then a linear decay to 0 at total_steps.
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps))


class TrainConfig(Section):
    """The training loop: length, logging, validation, time limit."""

    renamed = {"picture_grid": "image_grid"}  # noqa: RUF012

    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimizer steps. None: stop at `schedule.total_steps`."
    )
    log_every: int = Field(10, ge=1, description="Optimizer steps between two log entries.")
    log_gradients_every: int = Field(
        0,
        ge=0,
        description="Optimizer steps between two measurements of each loss's gradient norm in the encoder (`gradients/…`). One "
        "takes about as long as a step. 0: none.",
    )
    validate_every: int = Field(1000, ge=1, description="Optimizer steps between two validations.")
    validate_samples: int = Field(2048, ge=1, description="Largest number of validation samples.")
    image_grid: int = Field(8, ge=0, description="Number of samples in the image grid of a validation. 0: no grid.")
    recompute: bool = Field(
        False,
        description="Recompute each layer's activations in the backward pass instead of storing them: less "
        "memory, more operations.",
    )
    early_stopping: int = Field(
        0, ge=0, description="Stop after this many consecutive validations without a lower loss. 0: never."
    )
    preemption_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCONT", "SIGTERM"] = Field(
        "SIGUSR1",
        description="Signal by which a scheduler announces the end of the job. As after SIGTERM and SIGINT, the "
        "run saves a "
        "checkpoint and exits with code 75.",
    )
    time_limit_minutes: float | None = Field(
        None,
        gt=0,
        description="Time limit of one launch, in minutes. The run saves before it and exits with code 75. "
        "None: Slurm's limit where it is known, otherwise none.",
    )
    time_reserve_s: float = Field(
        120,
        ge=0,
        description="Time reserved for saving before the time limit, in seconds, in addition to the longest step "
        "so far.",
    )


class ProfileConfig(Section):
    """A trace of PyTorch's profiler, written to `<output>/profile`."""

    steps: int = Field(0, ge=0, description="Number of optimizer steps to trace. 0: no trace.")
    skip: int = Field(2, ge=0, description="Optimizer steps of this launch before the first traced step.")


class CheckpointConfig(Section):
    """When checkpoints are saved, and how many are kept."""

    every_steps: int = Field(1000, ge=1, description="Optimizer steps between two checkpoints.")
    keep: int = Field(
        2, ge=1, description="Number of newest checkpoints that are kept. The best one is kept in addition."
    )


class GuardConfig(Section):
    """When a run warns, skips a step, or stops; see `opt_ds.training.guard`."""

    skip_budget: int = Field(
        3,
        ge=0,
        description="Number of non-finite steps that may be skipped within `guard.skip_window` before the run stops.",
    )
    skip_window: int = Field(1000, ge=1, description="Optimizer steps over which skipped steps are counted.")
    spike_zscore: float = Field(
        8.0,
        ge=0,
        description="Warn when the loss or the gradient norm exceeds its mean by more than this many standard "
        "deviations. 0: never.",
    )
    spike_window: int = Field(
        100, ge=20, description="Optimizer steps over which that mean and standard deviation are computed."
    )
    skip_spikes: bool = Field(
        False, description="Skip steps whose loss is a spike. They count towards `guard.skip_budget`."
    )
    compare_ranks_every: int = Field(
        100, ge=0, description="Optimizer steps between two comparisons of the ranks' weights. 0: never."
    )
    rank_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="A rank that does not join a collective operation for this many seconds is considered lost.",
    )
    compare_calls_s: float = Field(
        20.0,
        gt=0,
        description="A rank that has waited for this many seconds compares its collective calls with those of "
        "the other ranks.",
    )


class ZeroConfig(Section):
    """DeepSpeed's ZeRO."""

    stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="What is partitioned over the ranks. 0: nothing, 1: optimizer state, 2: also gradients, 3: "
        "also weights.",
    )
    offload_optimizer: bool = Field(
        False, description="Keep the optimizer state in host memory and update the weights on the CPU."
    )


class EvaluateConfig(Section):
    """Experiments on the model during training. Results go to `metrics.jsonl` and TensorBoard."""

    every_steps: int = Field(
        0, ge=0, description="Optimizer steps between two evaluations. The end of the run is evaluated too. 0: never."
    )
    experiments: tuple[Literal["retrieval", "transcription", "captioning", "image-generation", "vqa"], ...] = Field(
        ("transcription", "retrieval"), description="Experiments that are run."
    )
    split: str = Field("valid", description="Split of the first store that is evaluated.")
    limit: int = Field(200, ge=2, description="Largest number of samples per experiment, chosen by the seed.")


class OpsConfig(Section):
    """Which implementation of the fused operators is used."""

    backend: str = Field(
        "auto",
        description="Backend of the fused operators: one name for all, or `layer_norm=fused,attention=torch`. "
        "auto: the fastest one that works on this machine.",
    )


class Config(Section):
    """Everything that a run depends on, except the stores' contents and the number of ranks."""

    preset: str = Field("opt-base", description="Preset that the configuration starts from.")
    seed: int = Field(
        1, ge=0, lt=2**63, description="Seed of all randomness: initial weights, order of samples, masks, dropout."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Precision of the forward and backward pass. auto: what `deepspeed_config` enables, "
        "otherwise bf16 from Ampere "
        "on, fp16 on older GPUs and fp32 on a CPU.",
    )
    deepspeed_config: str | None = Field(
        None,
        description="JSON file with further settings for DeepSpeed. None: only those that this configuration implies.",
    )
    data: DataConfig = Field(DataConfig(), description="Which stores are read, and how.")
    model: ModelSection = Field(ModelConfig(), description="Architecture of the model.")
    tasks: TasksSection = Field(default_factory=default_tasks, description="Pre-training tasks and their weights.")
    batch: BatchConfig = Field(BatchConfig(), description="Batch and micro-batch size.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW and gradient clipping.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="Learning rate over time.")
    train: TrainConfig = Field(TrainConfig(), description="The training loop.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When checkpoints are saved.")
    guard: GuardConfig = Field(GuardConfig(), description="When a run warns, skips a step, or stops.")
    zero: ZeroConfig = Field(ZeroConfig(), description="DeepSpeed's ZeRO.")
    ops: OpsConfig = Field(OpsConfig(), description="Backend of the fused operators.")
    profile: ProfileConfig = Field(ProfileConfig(), description="A trace of PyTorch's profiler.")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="Experiments during training.")
    finetune: FineTuneConfig | None = Field(None, description="Set by `opt-ds finetune`. None: pre-training.")
    init: InitConfig | None = Field(
        None, description="Set by `pretrain.py --init-from`. None: the run starts untrained."
    )

    @property
    def trained_losses(self) -> tuple[str, ...]:
        """Losses that the model was trained with, in this run or in those that its weights come from."""
        before = (
            *(self.finetune.trained_losses if self.finetune else ()),
            *(self.init.trained_losses if self.init else ()),
        )
        return tuple(loss for loss in self.tasks.all_losses if loss in before or loss in self.tasks.sampled_losses)

    def can(self, ability: str) -> bool:
        """Return whether the model was trained with the loss that teaches this ability (see `opt_ds.abilities`)."""
        return self.tasks.loss_for(ability) in self.trained_losses

    @property
    def max_steps(self) -> int:
        """Number of optimiser steps of the run."""
        return self.train.max_steps or self.schedule.total_steps

    @property
    def least_max_tokens(self) -> int:
        """Smallest possible `batch.max_tokens`: the longest sample, or all candidates of one sample, fit into it."""
        return max([self._longest_sample, *(needed for _, needed in self._candidates().values())])

    @property
    def _longest_sample(self) -> int:
        """Positions of the longest sample, with those of the decoders."""
        return self.model.max_sequence + self.model.max_text_tokens + 1 + self.model.num_image_codes

    def _candidates(self) -> dict[str, tuple[int, int]]:
        """Return task -> candidates of a sample and their positions, for tasks whose candidates share a micro-batch."""
        tasks = {name: unit(self) for name, unit in self.tasks.units.items()}
        counts = {name: 1 + task.most_copies for name, task in tasks.items() if task.most_copies and task.copies_share_batch}
        return {name: (count, count * self.model.max_sequence) for name, count in counts.items()}

    @classmethod
    def trust(cls, values: Any) -> None:
        """Allow the import of modalities and tasks that the user names by `module:Class`."""
        ModelConfig.trust(values.get("model"))
        TasksConfig.trust(values.get("tasks"))

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
        if self.train.log_gradients_every and self.zero.stage == 3:
            raise ValueError(
                "train.log_gradients_every runs the model on each rank alone, which zero.stage 3 does not allow: use a lower "
                "stage, or set it to 0"
            )
        if self.data.store_weights is not None and len(self.data.store_weights) != len(self.data.stores):
            raise ValueError(
                f"data.store_weights has {len(self.data.store_weights)} weights for {len(self.data.stores)} stores"
            )
        if self.data.store_weights is not None and min(self.data.store_weights) <= 0:
            raise ValueError("data.store_weights must hold positive weights")
        for name, (count, needed) in self._candidates().items():
            key = f"tasks.{name}.{self.tasks.units[name].copies_key}"
            if self.finetune is not None:
                raise ValueError(f"{key} is for pre-training: set it to 1")
            if self.batch.max_tokens < needed:
                raise ValueError(
                    f"batch.max_tokens {self.batch.max_tokens} cannot hold the {needed} positions of one sample's {count} "
                    f"candidates: raise it, or lower {key}"
                )
        if self.batch.max_tokens < self._longest_sample:
            raise ValueError(
                f"batch.max_tokens {self.batch.max_tokens} cannot hold the longest sample of {self._longest_sample} positions "
                "(text, regions, frames and what the decoders write): raise it"
            )
        return self


def load_config(source: str | None = None, settings: tuple[str, ...] | list[str] = ()) -> Config:
    """Return the configuration from a preset's name or a YAML file, with settings applied.

    Settings have the form `key.path=value`; values are YAML.

    A file may name a `preset` to start from. Raise UserError, in one line, for an unknown preset or key, or a bad
    value.
    """
    return load_section(Config, source or "opt-base", settings, PRESET_FOLDER)


def config_from_dict(tree: dict[str, Any], where: str, settings: tuple[str, ...] | list[str] = ()) -> Config:
    """Return the validated configuration of a plain tree (as in YAML) with settings applied.

    The UserError names `where`, the key and the fix.
    """
    return section_from_dict(Config, tree, where, settings)


def dump_config(config: Config) -> str:
    """Return the complete configuration as YAML. `load_config` of it returns an equal configuration."""
    return dump_section(config)
