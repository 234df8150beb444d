"""Gradients of ZeRO 1 and 2, and of bf16, in few kernels: the same bits as DeepSpeed's own way, which launches some for every
parameter.

Measured on an H100 before this (opt-base, fp16, ZeRO 1): of 20,900 kernels in a step of 5 micro-batches, 3,800 added gradients to
their fp32 sums and 5,400 looked for infinities; the GPU was busy for a quarter of the time, waiting for launches.
"""

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

_CHUNK = 25_000_000  # elements that are added together: 100 MB of fp32
_PIECE = 2**18  # elements that a CPU adds together: what it converts stays in the cache
_ALIGNMENT = 8  # elements, so that every part of a chunk starts at 16 bytes or more


def use_few_kernels(engine: DeepSpeedEngine) -> None:
    """Change how this engine adds up gradients and looks for overflows; does nothing where DeepSpeed does neither this way."""
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        if not optimizer.immediate_grad_update:
            _sum_bf16_after_backward(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        # With overlap_comm the hook that hands a gradient over also reduces its sum at once: nothing may wait there.
        if optimizer.use_grad_accum_attribute and not optimizer.overlap_comm:
            _sum_fp16_after_backward(optimizer)
        if not optimizer.cpu_offload:
            optimizer.has_overflow_partitioned_grads_serial = lambda: _any_not_finite(optimizer.averaged_gradients)


def _sum_bf16_after_backward(optimizer: BF16_Optimizer) -> None:
    """bf16 at stage 1: after each backward add all gradients to their fp32 sums, and drop them.

    DeepSpeed keeps them, fills them with zeros, and has autograd add the next ones to these.
    """

    @torch.no_grad()
    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        for number, group in enumerate(optimizer.bf16_groups):
            summed = [(place, parameter) for place, parameter in enumerate(group) if parameter.grad is not None]
            for place, parameter in summed:
                parameter._hp_grad = optimizer.fp32_groups_gradients[number][place]
                optimizer.fp32_groups_has_gradients[number][place] = True
            for chunk in _chunks(parameter for _, parameter in summed):
                add_to_sums([p._hp_grad.view(p.grad.shape) for p in chunk], [p.grad for p in chunk])
                for p in chunk:
                    p.grad = None

    optimizer.update_hp_grads = update_hp_grads


def _sum_fp16_after_backward(optimizer: DeepSpeedZeroOptimizer) -> None:
    """fp16 at stage 1: after each backward add all gradients to their fp32 sums (`grad_accum`), and drop them.

    DeepSpeed has a hook for each parameter, which does this and keeps account of the others; at 40 microseconds each they took a
    fifth of a step on an H200. Nobody reads the sums before `reduce_gradients`.
    """
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks.clear()

    @torch.no_grad()
    def fill_grad_accum_attribute() -> None:
        found = [p for group in optimizer.bit16_groups for p in group if p.grad is not None]
        if found:
            optimizer.setup_buckets()
        for chunk in _chunks(found):
            summed = [p for p in chunk if p.grad_accum is not None]
            add_to_sums([p.grad_accum for p in summed], [p.grad for p in summed])
            first = [p for p in chunk if p.grad_accum is None]  # the step's first micro-batch
            for p, total in zip(first, _copies([p.grad for p in first], optimizer.gradient_accumulation_dtype), strict=True):
                p.grad_accum = total
            for p in chunk:
                p.grad = None

    reduce_gradients = optimizer.reduce_gradients

    def add_and_reduce_gradients(*arguments: Any, **options: Any) -> None:
        fill_grad_accum_attribute()
        reduce_gradients(*arguments, **options)

    optimizer.fill_grad_accum_attribute, optimizer.reduce_gradients = fill_grad_accum_attribute, add_and_reduce_gradients


def _chunks(parameters: Iterable[nn.Parameter]) -> Iterable[list[Any]]:
    """Parameters in lists of about _CHUNK elements."""
    chunk: list[nn.Parameter] = []
    numel = 0
    for parameter in parameters:
        chunk.append(parameter)
        numel += parameter.numel()
        if numel >= _CHUNK:
            yield chunk
            chunk, numel = [], 0
    if chunk:
        yield chunk


def add_to_sums(sums: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    """Add gradients of any dtype to contiguous sums of a wider one, in place; the same bits as `sum += gradient`."""
    if not sums:
        return
    if sums[0].device.type != "cpu":
        torch._foreach_add_(sums, _copies(gradients, sums[0].dtype))
        return
    for total, gradient in zip(sums, gradients, strict=True):
        for total_piece, piece in zip(total.view(-1).split(_PIECE), gradient.reshape(-1).split(_PIECE), strict=True):
            total_piece += piece


def _copies(gradients: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """In another dtype, in one chunk."""
    if not gradients:
        return []
    sizes = [-(-gradient.numel() // _ALIGNMENT) * _ALIGNMENT for gradient in gradients]
    chunk = torch.empty(sum(sizes), dtype=dtype, device=gradients[0].device)
    parts = [part[: gradient.numel()].view_as(gradient) for part, gradient in zip(chunk.split(sizes), gradients, strict=True)]
    torch._foreach_copy_(parts, gradients)
    return parts


def _any_not_finite(gradients_by_group: dict[int, list[torch.Tensor]]) -> torch.Tensor:
    """bool [1]. Sums of magnitudes: what is not finite stays so in a sum, and finite gradients do not reach fp32's limit."""
    gradients = [g for group in gradients_by_group.values() for g in group if g is not None and g.numel()]
    if not gradients:
        return torch.zeros(1, dtype=torch.bool)
    sums = torch._foreach_norm(gradients, 1, dtype=torch.float32)
    return torch.stack(sums).sum().isfinite().logical_not().view(1)
