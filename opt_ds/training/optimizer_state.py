"""Weights and Adam moments by parameter name, whatever the ZeRO stage: the one place that knows DeepSpeed's layout.

Stages 1 and 2 keep fp32 master weights as one flat partition per parameter group and rank, stage 3 as flat sub-groups
of every parameter's slices; stage 0 (fp32) has the parameters themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def create_moments(engine: DeepSpeedEngine, adam_steps: int) -> None:
    """Give Adam its state now instead of at its first step: moments of 0, `adam_steps` updates done."""
    for master in _flat_masters(engine):
        engine.basic_optimizer.state[master] = {
            # float32, and beside the weights: what torch's fused AdamW wants
            "step": torch.tensor(float(adam_steps), dtype=torch.float32, device=master.device),
            **{key: torch.zeros_like(master, memory_format=torch.preserve_format) for key in MOMENTS},
        }
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def adam_steps(engine: DeepSpeedEngine) -> int:
    """Updates that Adam has done (steps skipped for an overflow do not count)."""
    state = engine.basic_optimizer.state[_flat_masters(engine)[0]]
    return int(state["step"].item())


def gather(engine: DeepSpeedEngine) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each parameter's name with its fp32 "weight", "exp_avg" and "exp_avg_sq", whole. A collective call."""
    staged = engine.zero_optimization_stage() > 0
    for name, parameter in engine.module.named_parameters():
        if staged:
            state = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            yield name, {"weight": safe_get_full_fp32_param(parameter), **state}
        else:
            state = {key: engine.basic_optimizer.state[parameter][key] for key in MOMENTS}
            yield name, {"weight": parameter.detach(), **state}


@torch.no_grad()
def scatter(engine: DeepSpeedEngine, read: Callable[[str, str], torch.Tensor], keys: tuple[str, ...]) -> None:
    """Set "weight", "exp_avg" or "exp_avg_sq" of every parameter to `read(name, key)`, a whole fp32 tensor.

    Only master weights are set: the module must have been loaded with the same weights before DeepSpeed took it over.
    """
    stage = engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        for key in keys:
            value = read(name, key)
            if stage == 0:
                target = parameter if key == "weight" else engine.basic_optimizer.state[parameter][key]
                target.copy_(value)
            elif stage == 3:
                part = _own_slice(parameter, value)
                if key == "weight":
                    safe_set_local_fp32_param(parameter, part)
                else:
                    safe_set_local_optimizer_state(parameter, part, key)
            elif key == "weight":
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)


def scaler_state(engine: DeepSpeedEngine) -> dict[str, float]:
    """State of the dynamic loss scale; empty without one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return {}
    return {field: getattr(scaler, field) for field in _SCALER_FIELDS}


def set_scaler_state(engine: DeepSpeedEngine, state: dict[str, float]) -> None:
    """Put a dynamic loss scale back; does nothing when this run, or the saved one, has none."""
    if scaler_state(engine):
        for field, value in state.items():
            setattr(engine.optimizer.loss_scaler, field, value)


def loss_scale(engine: DeepSpeedEngine) -> float:
    """The loss scale in use; 1 without one."""
    return float(scaler_state(engine).get("cur_scale", 1.0))


def least_loss_scale(engine: DeepSpeedEngine) -> float:
    """The scale below which it does not go; 1 without one."""
    return float(engine.optimizer.loss_scaler.min_scale) if scaler_state(engine) else 1.0


def take_step(engine: DeepSpeedEngine) -> bool:
    """`engine.step()`; gives whether the weights were updated (not so when the gradient is not finite).

    DeepSpeed grows the loss scale before it divides by it: in that step the gradient would come out halved. So the growth
    waits for the step's end. At the smallest scale it would raise; here the step is just not taken.
    """
    taken = _step(engine)
    if not taken:
        _drop_offloaded_sums(engine)
    return taken


def _step(engine: DeepSpeedEngine) -> bool:
    if not scaler_state(engine):
        engine.step()
        return engine.was_step_applied()
    scaler = engine.optimizer.loss_scaler
    scaler.raise_error_at_min_scale = False
    shrink = {"_update_scale": lambda has_overflow=False: scaler.update_scale(True) if has_overflow else None}
    with _changed(engine.optimizer, shrink):
        engine.step()
    if engine.was_step_applied():
        scaler.update_scale(False)
    return engine.was_step_applied()


def discard_gradients(engine: DeepSpeedEngine) -> None:
    """Drop what the step's micro-batches accumulated: DeepSpeed's own way with an overflow, but the loss scale stays."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer

    def overflow(*_: object, **__: object) -> None:
        optimizer.overflow = True

    if stage == 0:
        engine.zero_grad()
        return
    changes: dict[str, Any]
    if hasattr(optimizer, "get_grads_for_norm"):  # bf16 at stage 1
        infinite = torch.full((1,), torch.inf, device=engine.device)
        changes = {"get_grads_for_norm": lambda for_clipping=False: ([infinite], {})}
    else:
        check = "_overflow_check_and_loss_scale_update" if stage == 3 else "check_overflow"
        changes = {check: overflow, "check_grad_overflow": True, "_update_scale": lambda has_overflow=False: None}
    with _changed(optimizer, changes):
        engine.step()
    _drop_offloaded_sums(engine)


def _drop_offloaded_sums(engine: DeepSpeedEngine) -> None:
    """Drop the fp32 sums of a step that was not taken.

    With an offloaded optimizer at stages 1 and 2, DeepSpeed 0.19 keeps them after an overflow and adds the next
    gradients to them, so one infinity would make every later step overflow.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.cpu_offload:
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


@contextmanager
def _changed(thing: Any, changes: dict[str, Any]) -> Iterator[None]:
    """Give an object other attributes for a while."""
    own = vars(thing)
    before = {name: own[name] for name in changes if name in own}
    own.update(changes)
    try:
        yield
    finally:
        for name in changes:
            del own[name]
        own.update(before)


def _flat_masters(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """The tensors that Adam updates on this rank."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def _own_slice(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a stage-3 parameter; DeepSpeed pads the last one with zeros."""
    numel = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    start = numel * torch.distributed.get_rank()
    part = torch.zeros(numel, dtype=value.dtype)
    flat = value.flatten()[start : start + numel]
    part[: len(flat)] = flat
    return part
