"""Gradient accumulation and optimiser of the measured training loop, the same for all methods."""

import torch
from torch import nn

from opt_ds.config import Config
from opt_ds.training.gradients import add_to_sums
from opt_ds.training.trainer import parameter_groups

LEARNING_RATE = 1e-4


class Accumulator:
    """Accumulates gradients in fp32, clips them, and runs one fused AdamW on fp32 masters, as DeepSpeed does.

    Parameters that do not require a gradient are not trained.
    """

    def __init__(self, model: nn.Module, config: Config, dtype: torch.dtype) -> None:
        self.model, self.clip_norm = model.to(dtype).train(), config.optimizer.clip_norm
        self.weights = [p for p in model.parameters() if p.requires_grad]
        masters = {p: p if dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.weights}
        self.masters = [masters[p] for p in self.weights]
        self._half = dtype != torch.float32
        groups = parameter_groups(model, config.optimizer.weight_decay)
        for group in groups:
            group["params"] = [masters[p] for p in group["params"] if p in masters]
        self._adam = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=config.optimizer.betas, fused=True)
        self.sums = [torch.zeros_like(master) for master in self.masters]
        for master, total in zip(self.masters, self.sums, strict=True):
            master.grad = total

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.weights)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of the loss to the sums."""
        loss.backward()
        if self._half:
            pairs = [(s, p.grad) for s, p in zip(self.sums, self.weights, strict=True) if p.grad is not None]
            add_to_sums([total for total, _ in pairs], [half for _, half in pairs])
            for p in self.weights:
                p.grad = None

    @torch.no_grad()
    def update(self) -> None:
        """Clip the summed gradients, update the weights and set the sums to zero."""
        nn.utils.clip_grad_norm_(self.masters, self.clip_norm, foreach=True)
        self._adam.step()
        torch._foreach_zero_(self.sums)
        if self._half:
            torch._foreach_copy_(list[torch.Tensor](self.weights), list[torch.Tensor](self.masters))
