"""Everything that relies on undocumented parts of DeepSpeed 0.19. No other module touches them.

`tests/training/test_deepspeed_internals.py` records the attributes, signatures and source of these parts. It fails when
another version of DeepSpeed changes one, and names the functions of this module to review.

Other modules use DeepSpeed's documented interface only: `deepspeed.initialize`, the engine's public methods and
`deepspeed.utils.safe_get_…` and `safe_set_…`. DeepSpeed is imported inside the functions, because
`name_accelerator` must run before DeepSpeed is loaded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opt_ds.training import gradients

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from pydantic import BaseModel

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


# ---- loading DeepSpeed


def name_accelerator(device_type: str | None = None) -> None:
    """Name the accelerator, "cpu" or "cuda", before DeepSpeed is loaded. Otherwise it guesses, with a warning on a CPU.

    The environment's DS_ACCELERATOR is kept. None: a GPU if there is one.
    """
    found = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_ACCELERATOR", found)


def load_without_compiling() -> None:
    """Load the parts of DeepSpeed that would compile code which no run uses.

    DeepSpeed compiles its shared-memory collectives at first use, for half a minute. The engine imports the Muon
    optimiser whatever the optimiser is; each rank would load torch's compiler for it at its first step, which takes two
    seconds of one core.
    """
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime import compiler

    __compatible_ops__["deepspeed_shm_comm"] = False
    compiled = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compiled


def section_models() -> "dict[str, type[BaseModel]]":
    """Return the models with which DeepSpeed checks sections of its configuration, by section."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
    }


# ---- parameters of stage 3, of which each rank holds a slice


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape, also at stage 3."""
    return getattr(parameter, "ds_shape", parameter.shape)


def full_numel(parameter: nn.Parameter) -> int:
    """Return a parameter's number of elements, also at stage 3."""
    return getattr(parameter, "ds_numel", parameter.numel())


def own_slice(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """Return this rank's slice of a stage-3 parameter's full `value`. DeepSpeed pads the last slice with zeros."""
    numel = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    start = numel * torch.distributed.get_rank()
    part = torch.zeros(numel, dtype=value.dtype)
    flat = value.flatten()[start : start + numel]
    part[: len(flat)] = flat
    return part


# ---- the optimizer's state


def base_optimizer(engine: "DeepSpeedEngine") -> torch.optim.Optimizer:
    """Return the torch optimizer that the engine's optimizer wraps. At stage 0 both are the same."""
    return engine.basic_optimizer


def flat_masters(engine: "DeepSpeedEngine") -> list[torch.Tensor]:
    """Return the tensors that the torch optimizer updates on this rank."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in base_optimizer(engine).param_groups for parameter in group["params"]]


def link_moments(engine: "DeepSpeedEngine") -> None:
    """Let `safe_get_full_optimizer_state` find the torch optimizer's state before its first step."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


# ---- the dynamic loss scale of fp16


def scaler_state(engine: "DeepSpeedEngine") -> dict[str, float]:
    """Return the state of the dynamic loss scale, or an empty dict if there is none."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return {}
    return {field: getattr(scaler, field) for field in _SCALER_FIELDS}


def set_scaler_state(engine: "DeepSpeedEngine", state: dict[str, float]) -> None:
    """Restore the dynamic loss scale. Do nothing if this run or the saved one has none."""
    if scaler_state(engine):
        for field, value in state.items():
            setattr(engine.optimizer.loss_scaler, field, value)


def loss_scale(engine: "DeepSpeedEngine") -> float:
    """Return the current loss scale, or 1 if there is none."""
    return float(scaler_state(engine).get("cur_scale", 1.0))


def least_loss_scale(engine: "DeepSpeedEngine") -> float:
    """Return the minimum loss scale, or 1 if there is none."""
    return float(engine.optimizer.loss_scaler.min_scale) if scaler_state(engine) else 1.0


# ---- the update


def take_step(engine: "DeepSpeedEngine") -> bool:
    """Call `engine.step()`. Return whether the weights were updated, which is false if the gradient is not finite.

    DeepSpeed grows the loss scale before it divides by it, so the gradient of that step would be halved. Here the
    growth is deferred to the end of the step. At the minimum scale DeepSpeed would raise; here the step is only
    skipped.
    """
    taken = _step(engine)
    if not taken:
        _drop_offloaded_sums(engine)
    return taken


def _step(engine: "DeepSpeedEngine") -> bool:
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


def discard_gradients(engine: "DeepSpeedEngine") -> None:
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


def _drop_offloaded_sums(engine: "DeepSpeedEngine") -> None:
    """Discard the fp32 sums of a step that was skipped.

    With an offloaded optimizer at stages 1 and 2, DeepSpeed 0.19 keeps these sums after an overflow and adds the next
    gradients to them. A single infinity would then make every later step overflow.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

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


# ---- gradient accumulation and the overflow check


def use_few_kernels(engine: "DeepSpeedEngine") -> None:
    """Replace this engine's gradient accumulation and overflow check by those of `gradients`.

    The results have the same bits. Do nothing if DeepSpeed does not use them in this form.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        if not optimizer.immediate_grad_update:
            _sum_bf16_after_backward(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        # With overlap_comm, the hook of a gradient also reduces its sum at once, so accumulation cannot be deferred.
        if optimizer.use_grad_accum_attribute and not optimizer.overlap_comm:
            _sum_fp16_after_backward(optimizer)
        if not optimizer.cpu_offload:
            optimizer.has_overflow_partitioned_grads_serial = lambda: gradients.any_not_finite(
                optimizer.averaged_gradients
            )


def _sum_bf16_after_backward(optimizer: "BF16_Optimizer") -> None:
    """For bf16 at stage 1: after each backward, add all gradients to their fp32 sums and free them.

    DeepSpeed keeps the gradients, fills them with zeros and lets autograd add the next ones to them.
    """

    @torch.no_grad()
    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        for number, group in enumerate(optimizer.bf16_groups):
            summed = [(place, parameter) for place, parameter in enumerate(group) if parameter.grad is not None]
            for place, parameter in summed:
                parameter._hp_grad = optimizer.fp32_groups_gradients[number][place]
                optimizer.fp32_groups_has_gradients[number][place] = True
            for chunk in gradients.chunks(parameter for _, parameter in summed):
                gradients.add_to_sums([p._hp_grad.view(p.grad.shape) for p in chunk], [p.grad for p in chunk])
                for p in chunk:
                    p.grad = None

    optimizer.update_hp_grads = update_hp_grads


def _sum_fp16_after_backward(optimizer: "DeepSpeedZeroOptimizer") -> None:
    """For fp16 at stage 1: after each backward, add all gradients to their fp32 sums (`grad_accum`) and free them.

    DeepSpeed does this in one hook per parameter, with bookkeeping for the other parameters. At 40 microseconds each
    the hooks took a fifth of a step on an H200. The sums are not read before `reduce_gradients`.
    """
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks.clear()

    @torch.no_grad()
    def fill_grad_accum_attribute() -> None:
        found = [p for group in optimizer.bit16_groups for p in group if p.grad is not None]
        if found:
            optimizer.setup_buckets()
        for chunk in gradients.chunks(found):
            summed = [p for p in chunk if p.grad_accum is not None]
            gradients.add_to_sums([p.grad_accum for p in summed], [p.grad for p in summed])
            first = [p for p in chunk if p.grad_accum is None]  # the step's first micro-batch
            totals = gradients.copies([p.grad for p in first], optimizer.gradient_accumulation_dtype)
            for p, total in zip(first, totals, strict=True):
                p.grad_accum = total
            for p in chunk:
                p.grad = None

    reduce_gradients = optimizer.reduce_gradients

    def add_and_reduce_gradients(*arguments: Any, **options: Any) -> None:
        fill_grad_accum_attribute()
        reduce_gradients(*arguments, **options)

    optimizer.fill_grad_accum_attribute, optimizer.reduce_gradients = fill_grad_accum_attribute, add_and_reduce_gradients
