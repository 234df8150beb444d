"""The configuration of a run: one frozen tree of sections, read from presets, YAML files and settings."""

from opt_ds.config.run import (
    STANDARD_LIMIT,
    Config,
    DataConfig,
    EvaluateConfig,
    FineTuneConfig,
    GuardConfig,
    InitConfig,
    LossConfig,
    ModelConfig,
    ProfileConfig,
    TasksConfig,
    TrainConfig,
    config_from_dict,
    default_tasks,
    dump_config,
    load_config,
)
from opt_ds.config.section import Section

__all__ = [
    "STANDARD_LIMIT",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "FineTuneConfig",
    "GuardConfig",
    "InitConfig",
    "LossConfig",
    "ModelConfig",
    "ProfileConfig",
    "Section",
    "TasksConfig",
    "TrainConfig",
    "config_from_dict",
    "default_tasks",
    "dump_config",
    "load_config",
]
