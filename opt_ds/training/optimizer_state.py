"""Weights and Adam moments by parameter name, for every ZeRO stage. Only this module knows DeepSpeed's layout.

Stages 1 and 2 keep fp32 master weights as one flat partition per parameter group and rank. Stage 3 keeps them as flat
sub-groups of every parameter's slices. Stage 0 (fp32) has the parameters themselves.
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
    """Create Adam's state now instead of at its first step, with moments of 0 and `adam_steps` completed updates."""
    for master in _flat_masters(engine):
        engine.basic_optimizer.state[master] = {
            # Torch's fused AdamW requires a float32 step count on the device of the weights.
            "step": torch.tensor(float(adam_steps), dtype=torch.float32, device=master.device),
            **{key: torch.zeros_like(master, memory_format=torch.preserve_format) for key in MOMENTS},
        }
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def adam_steps(engine: DeepSpeedEngine) -> int:
    """Return the number of updates that Adam has done. Steps skipped because of an overflow do not count."""
    state = engine.basic_optimizer.state[_flat_masters(engine)[0]]
    return int(state["step"].item())


def gather(engine: DeepSpeedEngine) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield each parameter's name and its full fp32 "weight", "exp_avg" and "exp_avg_sq". This is a collective call."""
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
    """Set each of `keys` of every parameter to `read(name, key)`, a full fp32 tensor.

    The keys are "weight", "exp_avg" and "exp_avg_sq".

    Only master weights are set. The module must have been loaded with the same weights before DeepSpeed wrapped it.
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
    """Return the state of the dynamic loss scale, or an empty dict if there is none."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return {}
    return {field: getattr(scaler, field) for field in _SCALER_FIELDS}


def set_scaler_state(engine: DeepSpeedEngine, state: dict[str, float]) -> None:
    """Restore the dynamic loss scale. Do nothing if this run or the saved one has none."""
    if scaler_state(engine):
        for field, value in state.items():
            setattr(engine.optimizer.loss_scaler, field, value)


def loss_scale(engine: DeepSpeedEngine) -> float:
    """Return the current loss scale, or 1 if there is none."""
    return float(scaler_state(engine).get("cur_scale", 1.0))


def least_loss_scale(engine: DeepSpeedEngine) -> float:
    """Return the minimum loss scale, or 1 if there is none."""
    return float(engine.optimizer.loss_scaler.min_scale) if scaler_state(engine) else 1.0


def take_step(engine: DeepSpeedEngine) -> bool:
    """Call `engine.step()`. Return whether the weights were updated, which is false if the gradient is not finite.

    DeepSpeed grows the loss scale before it divides by it, so the gradient of that step would be halved. Here the
    growth is deferred to the end of the step. At the minimum scale DeepSpeed would raise; here the step is only
    skipped.
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
    """Discard the gradients that the step's micro-batches accumulated.

    This uses DeepSpeed's own handling of an overflow but leaves the loss scale unchanged.
    """
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
    """Discard the fp32 sums of a step that was skipped.

    With an offloaded optimizer at stages 1 and 2, DeepSpeed 0.19 keeps these sums after an overflow and adds the next
    gradients to them. A single infinity would then make every later step overflow.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.cpu_offload:
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


@contextmanager
def _changed(thing: Any, changes: dict[str, Any]) -> Iterator[None]:
    """Temporarily replace attributes of an object."""
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
    """Return the tensors that Adam updates on this rank."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def _own_slice(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """Return this rank's slice of a stage-3 parameter. DeepSpeed pads the last slice with zeros."""
    numel = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    start = numel * torch.distributed.get_rank()
    part = torch.zeros(numel, dtype=value.dtype)
    flat = value.flatten()[start : start + numel]
    part[: len(flat)] = flat
    return part
