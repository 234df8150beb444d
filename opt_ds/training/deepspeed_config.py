"""Conversion of the run configuration to DeepSpeed's.

Only this module sets precision, batch arithmetic, clipping and ZeRO.

Behaviour of DeepSpeed 0.19 that matters here (each item is covered by a test):
- `gradient_clipping` defaults to 1.0 if the JSON does not name it, so it is always written; 0.0 disables it. At stage 0
  DeepSpeed computes the norm tensor by tensor and does not report it. There `Stepper` clips, because it needs the norm
  anyway.
- Gradients accumulate in the model's dtype unless `data_types.grad_accum_dtype` is fp32. Stage 0 does not support that
  setting, so half precision at stage 0 is an error.
- The number of micro-batches varies from step to step. The trainer therefore sets the accumulation boundary
  (`set_gradient_accumulation_boundary`, `backward(scale_wrt_gas=False)`), and DeepSpeed is configured for 1 × 1 and
  never divides.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opt_ds.config import Config
from opt_ds.errors import UserError, did_you_mean
from opt_ds.user_files import read_json

Precision = Literal["fp32", "bf16", "fp16"]

#: Sections of a DeepSpeed JSON that a run accepts. All other sections are owned by the run configuration or have no
#: use.
_TAKEN_SECTIONS = (
    "zero_optimization", "fp16", "bf16", "data_types", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "aio", "compile",
)  # fmt: skip
_OWNED = {
    "train_batch_size": "batch.size",
    "train_micro_batch_size_per_gpu": "batch.max_tokens",
    "gradient_accumulation_steps": "batch.size and batch.max_tokens",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "steps_per_print": "train.log_every",
}
_OBJECTS = ("zero_optimization", "fp16", "bf16", "data_types", "comms_logger", "flops_profiler", "aio", "compile")
_MAX_SCALE_POWER = 32
_AMPERE = (8, 0)  # the first compute capability with bf16


@dataclass(frozen=True)
class Hardware:
    """What determines the precision: the kind of device, its name and, for a GPU, its compute capability."""

    kind: Literal["cpu", "cuda"]
    name: str
    capability: tuple[int, int] | None = None
    architectures: tuple[str, ...] = ()  # CUDA architectures that this torch was built for

    @staticmethod
    def detect() -> "Hardware":
        """Return this process's hardware."""
        import platform

        import torch

        if not torch.cuda.is_available():
            return Hardware("cpu", _processor_name() or platform.machine())
        device = torch.cuda.current_device()
        return Hardware(
            "cuda",
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
            tuple(torch.cuda.get_arch_list()),
        )


def choose_precision(config: Config, hardware: Hardware) -> Precision:
    """Return the precision of the run.

    `auto` means the precision that the DeepSpeed JSON enables. Without one it means bf16 from Ampere on, fp16 on older
    GPUs and fp32 on the CPU.

    Raise UserError for unsupported combinations: fp16 on the CPU, bf16 on a GPU without it, half precision with stage
    0.
    """
    if config.precision != "auto":
        chosen, why = config.precision, f"precision {config.precision}"
    else:
        chosen = _json_precision(config) or _native_precision(hardware)
        why = f"precision auto, that is {chosen} here,"
    if chosen == "fp16" and hardware.kind == "cpu":
        raise UserError(f"{why} does not run on the CPU: use --set precision=fp32 (or bf16)")
    if chosen == "bf16" and hardware.capability and hardware.capability < _AMPERE:
        beside = f", and in {config.deepspeed_config}" if _json_precision(config) == "bf16" else ""
        remedy = f"use --set precision={_native_precision(hardware)}{beside}"
        raise UserError(f"{why} is more than {hardware.name} has, older than Ampere: {remedy}")
    if chosen != "fp32" and config.zero.stage == 0:
        raise UserError(f"{why} with zero.stage 0 would not accumulate gradients in fp32: use --set zero.stage=1")
    if hardware.capability and not has_kernels(hardware):
        raise UserError(
            f"this torch has no kernels for {hardware.name} (sm_{''.join(map(str, hardware.capability))}; it has "
            f"{', '.join(hardware.architectures)}): install one that has, for a V100 from PyTorch's cu126 index"
        )
    return chosen


def deepspeed_settings(config: Config, precision: Precision, num_micro_batches: int = 1) -> dict[str, Any]:
    """Return DeepSpeed's configuration for this run, with the JSON of `deepspeed_config` merged in.

    `num_micro_batches` is the number per step and rank. Losses are divided by their counts over the global batch, so
    the gradient of each micro-batch is smaller by about this factor. The initial fp16 loss scale is larger by the same
    factor (2¹⁶ for one micro-batch).

    Raise UserError, naming the JSON's key and the run config's key, if the two disagree.
    """
    if config.zero.offload_optimizer and not config.zero.stage:
        raise UserError("zero.offload_optimizer needs a partitioned optimizer, zero.stage 0 has none: use --set zero.stage=1")
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_norm if config.zero.stage else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "fp16": {"enabled": False},
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {
            "stage": config.zero.stage,
            # DeepSpeed's default of 500 million elements would reserve 2 GB for gradients in transit.
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
    }
    if precision == "fp16":
        power = min(_MAX_SCALE_POWER, 16 + math.ceil(math.log2(max(1, num_micro_batches))))
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": power,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
    if config.zero.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": precision == "fp16"}
        # Torch's fused AdamW is used instead of DeepSpeed's own, which needs a compiler.
        settings["zero_force_ds_cpu_optimizer"] = False
    tree = _read_json(config)
    for section, value in tree.items():
        merged = _merged(config, precision, section, value, settings.get(section))
        if merged is not None:
            settings[section] = merged
    _check_by_deepspeed(config, {section: settings[section] for section in tree if section in settings})
    return settings


def _check_by_deepspeed(config: Config, sections: dict[str, Any]) -> None:
    """Raise UserError for settings in these sections that DeepSpeed would reject only after the ranks have joined."""
    if not sections:
        return
    from pydantic import ValidationError

    from opt_ds.training import deepspeed_internals

    deepspeed_internals.name_accelerator()
    for section, model in deepspeed_internals.section_models().items():
        where = f"{config.deepspeed_config}: {section}"
        try:
            model(**sections.get(section, {}))
        except AssertionError as error:  # a deprecated key together with the one that replaces it
            raise UserError(f"{where}: {error}: remove the deprecated one") from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join((where, *map(str, first["loc"])))
            if first["type"] != "extra_forbidden":
                problem = first["msg"].removeprefix("Value error, ")
                raise UserError(f"{key} {_short(first['input'])}: {problem}: change it") from None
            known = [name for field, about in model.model_fields.items() for name in (field, about.alias) if name]
            near = did_you_mean(str(first["loc"][-1]), known) if len(first["loc"]) == 1 else ""
            raise UserError(f"{key} is not a setting of DeepSpeed{near}: remove it, or correct its name") from None
    data_type = sections.get("communication_data_type", "fp32")
    if data_type not in ("fp32", "fp16", "bf16"):
        raise UserError(
            f"{config.deepspeed_config}: communication_data_type {_short(data_type)}: choose fp32, fp16 or bf16"
        )


def _merged(config: Config, precision: Precision, section: str, value: Any, own: Any) -> Any:
    where = f"{config.deepspeed_config}: {section}"
    if section in _OWNED:
        if value != "auto" and not (section == "gradient_clipping" and value == config.optimizer.clip_norm):
            raise UserError(
                f"{where} {_short(value)} contradicts {_OWNED[section]} of the run config, which owns it: remove it "
                "from the JSON"
                + (f" (optimizer.clip_norm is {config.optimizer.clip_norm})" if section == "gradient_clipping" else "")
            )
        return own
    if section not in _TAKEN_SECTIONS:
        raise UserError(
            f"{where} is not allowed in a DeepSpeed JSON{did_you_mean(section, _TAKEN_SECTIONS)}: remove it"
        )
    if value == "auto":
        return own
    if section in _OBJECTS and not isinstance(value, dict):
        raise UserError(f'{where} {_short(value)}: expected an object of settings, as in {{"fp16": {{"enabled": true}}}}')
    if not isinstance(value, dict):
        return value
    agreed = {  # key -> (expected value, the run config's key)
        ("zero_optimization", "stage"): (config.zero.stage, "zero.stage"),
        ("fp16", "enabled"): (precision == "fp16", "precision"),
        ("bf16", "enabled"): (precision == "bf16", "precision"),
        ("data_types", "grad_accum_dtype"): ("fp32", "the rule that gradients accumulate in fp32"),
    }
    taken = dict(own or {})
    for key, item in value.items():
        if item == "auto":
            continue
        if section == "zero_optimization" and key == "offload_optimizer":
            wants = isinstance(item, dict) and item.get("device", "none") != "none"
            if wants != config.zero.offload_optimizer:
                raise UserError(
                    f"{where}.{key} {_short(item)} contradicts zero.offload_optimizer "
                    f"{config.zero.offload_optimizer} of the run config: change one of them"
                )
        if (section, key) == ("zero_optimization", "compute_grad_norm") and item is not True:
            raise UserError(f"{where}.{key} {_short(item)}: the guard and the log need the gradient's norm: remove it")
        expected, name = agreed.get((section, key), (item, ""))
        if item != expected:
            ours = precision if name == "precision" else expected
            raise UserError(
                f"{where}.{key} {_short(item)} contradicts {name} {ours} of the run config: change one of them"
            )
        taken[key] = item
    return taken


def _read_json(config: Config) -> dict[str, Any]:
    if config.deepspeed_config is None:
        return {}
    path = Path(config.deepspeed_config)
    try:
        tree = read_json(path)
    except UserError as error:
        raise UserError(f"deepspeed_config {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"deepspeed_config {path}: expected a JSON object")
    return tree


def _json_precision(config: Config) -> Precision | None:
    tree = _read_json(config)
    for section in ("fp16", "bf16"):
        if isinstance(tree.get(section), dict) and tree[section].get("enabled") is True:
            return section  # type: ignore[return-value]
    return None


def _native_precision(hardware: Hardware) -> Precision:
    if hardware.capability is None:
        return "fp32"
    if hardware.capability >= _AMPERE:
        return "bf16"
    return "fp16" if hardware.capability >= (7, 0) else "fp32"


def has_kernels(hardware: Hardware) -> bool:
    """Return whether torch's binaries run on this GPU.

    They do for the same major and no newer minor version, or if there is PTX to compile from.
    """
    assert hardware.capability is not None
    major, minor = hardware.capability
    for name in hardware.architectures:
        digits = "".join(c for c in name.split("_")[-1] if c.isdigit())
        if not digits:
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if name.startswith("compute_") and built <= (major, minor):
            return True
        if built[0] == major and built[1] <= minor:
            return True
    return not hardware.architectures


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
