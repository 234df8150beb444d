"""Which kernel each operator uses: chosen once, said once, stored with the run.

Known backends: `torch` (plain PyTorch, every device). `auto` takes the fastest that is built and right for the device.
"""

import torch

from opt_ds.errors import UserError, did_you_mean

OPERATORS = ("layer_norm", "attention")
BACKENDS = ("torch",)

_chosen: dict[str, str] = dict.fromkeys(OPERATORS, "torch")


def choose(name: str = "auto") -> dict[str, str]:
    """Choose the backend of every operator. Raises UserError for a name that no operator knows."""
    if name not in ("auto", *BACKENDS):
        raise UserError(
            f'ops.backend "{name}" is unknown{did_you_mean(name, ("auto", *BACKENDS))}: use auto or {", ".join(BACKENDS)}'
        )
    backend = "torch" if name == "auto" else name
    _chosen.update(dict.fromkeys(OPERATORS, backend))
    return describe()


def describe() -> dict[str, str]:
    """Operator -> the kernel in use."""
    return dict(_chosen)


def seed_dropout(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Make PyTorch's dropout of the coming forward pass a pure function of (seed, step, rank, micro-batch)."""
    from opt_ds.data.keyed import keyed_hash

    torch.manual_seed(int(keyed_hash(seed, "dropout", step, rank, micro_batch)) & (2**63 - 1))
