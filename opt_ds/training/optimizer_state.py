"""Weights and Adam moments by parameter name, for every ZeRO stage.

Stages 1 and 2 keep fp32 master weights as one flat partition per parameter group and rank. Stage 3 keeps them as flat
sub-groups of every parameter's slices. Stage 0 (fp32) has the parameters themselves.
"""

from collections.abc import Callable, Iterator

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from opt_ds.training import deepspeed_internals as internals

MOMENTS = ("exp_avg", "exp_avg_sq")


def create_moments(engine: DeepSpeedEngine, adam_steps: int) -> None:
    """Create Adam's state now instead of at its first step, with moments of 0 and `adam_steps` completed updates."""
    for master in internals.flat_masters(engine):
        internals.base_optimizer(engine).state[master] = {
            # Torch's fused AdamW requires a float32 step count on the device of the weights.
            "step": torch.tensor(float(adam_steps), dtype=torch.float32, device=master.device),
            **{key: torch.zeros_like(master, memory_format=torch.preserve_format) for key in MOMENTS},
        }
    internals.link_moments(engine)


def adam_steps(engine: DeepSpeedEngine) -> int:
    """Return the number of updates that Adam has done. Steps skipped because of an overflow do not count."""
    state = internals.base_optimizer(engine).state[internals.flat_masters(engine)[0]]
    return int(state["step"].item())


def gather(engine: DeepSpeedEngine) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield each parameter's name and its full fp32 "weight", "exp_avg" and "exp_avg_sq". This is a collective call."""
    staged = engine.zero_optimization_stage() > 0
    for name, parameter in engine.module.named_parameters():
        if staged:
            state = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            yield name, {"weight": safe_get_full_fp32_param(parameter), **state}
        else:
            state = {key: internals.base_optimizer(engine).state[parameter][key] for key in MOMENTS}
            yield name, {"weight": parameter.detach(), **state}


@torch.no_grad()
def scatter(engine: DeepSpeedEngine, read: Callable[[str, str], torch.Tensor], keys: tuple[str, ...]) -> None:
    """Set each of `keys` of every parameter to `read(name, key)`, a full fp32 tensor.

    The keys are "weight", "exp_avg" and "exp_avg_sq".

    Only master weights are set. The module must have been loaded with the same weights before DeepSpeed wrapped it.
    """
    stage = engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        for key in keys:
            value = read(name, key)
            if stage == 0:
                target = parameter if key == "weight" else internals.base_optimizer(engine).state[parameter][key]
                target.copy_(value)
            elif stage == 3:
                part = internals.own_slice(parameter, value)
                if key == "weight":
                    safe_set_local_fp32_param(parameter, part)
                else:
                    safe_set_local_optimizer_state(parameter, part, key)
            elif key == "weight":
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
