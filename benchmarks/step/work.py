"""Work of a method in an optimiser step, counted while it runs, and the check that all methods do the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from opt_ds.config import ModelConfig
from opt_ds.data.batch import PackedBatch
from opt_ds.tasks.mlm import MaskedTokens

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)
#: Counts that must be the same for all methods.
SAME = ("samples", "tokens", "masked", "scored", "updates", "parameters")


@dataclass
class Work:
    """Work of one optimiser step."""

    samples: int = 0
    tokens: int = 0  # positions with content
    masked: int = 0  # masked WordPieces, the terms of the loss
    scored: int = 0  # positions at which the vocabulary was scored in the forward pass
    positions: int = 0  # positions that went through the first layer, including padding
    flops: float = 0.0  # operations of the products of forward and backward, including padding
    updates: int = 0  # updates of the optimiser
    parameters: int = 0  # parameters that an update changes

    def add_batch(self, batch: PackedBatch) -> None:
        """Add what the batch contains."""
        masked = batch.parts["mlm"]
        assert isinstance(masked, MaskedTokens)
        self.samples += batch.num_samples
        self.tokens += batch.inputs.sequences.total
        self.masked += len(masked.targets)

    def add_run(
        self, model: ModelConfig, forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], None]
    ) -> None:
        """Run forward and backward of a micro-batch, and add what they compute."""
        with ProductCounter(model) as first:
            loss = forward()
        with ProductCounter(model) as second:
            backward(loss)
        self.scored += first.scored
        self.positions += first.positions
        self.flops += first.flops + second.flops


class ProductCounter(TorchDispatchMode):
    """Counts the matrix products that run on this thread. Operators that PyTorch does not know are not counted."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.flops, self.scored, self.positions = 0.0, 0, 0
        self._vocab_size, self._ffn_size = model.vocab_size, model.ffn_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operator = func._overloadpacket
        if operator in flop_registry:
            self.flops += flop_registry[operator](*args, **kwargs, out_val=out)
        if operator in PRODUCTS:
            rows, columns = out.shape
            self.scored += rows * (columns == self._vocab_size)
            self.positions = max(self.positions, rows * (columns == self._ffn_size))
        return out


def check_same_work(works: Mapping[str, Work], names: tuple[str, ...] = SAME) -> None:
    """Raise ValueError if a count differs between the methods, or if a position was scored that is not masked."""
    for name in names:
        counts = {method: getattr(work, name) for method, work in works.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the methods do not do the same work: {name} is {counts}")
    for method, work in works.items():
        if "scored" in names and work.scored != work.masked:
            raise ValueError(f"{method} scored the vocabulary at {work.scored} positions; {work.masked} are masked")
