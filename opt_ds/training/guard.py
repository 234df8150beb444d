"""Guard of a run: detects non-finite steps, loss spikes and ranks whose weights differ.

Its decisions are a function of the run's own history, which is part of each checkpoint. A resumed run therefore makes
the same decisions.
"""

import math
import statistics
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from opt_ds.config import GuardConfig
from opt_ds.data.batch import PackedBatch
from opt_ds.errors import RunError
from opt_ds.store.files import atomic_file, write_json
from opt_ds.training.checkpoint import GuardState
from opt_ds.training.distributed import ProcessGroup

FOLDER = "guard"
_LEAST_HISTORY = 20  # number of values before z-scores are used

Verdict = Literal["fine", "spike", "not finite"]


class TrainingError(RunError):
    """Training itself cannot continue."""


class Guard:
    """Checks each step's loss (before the update) and gradient norm (after it), and counts skipped steps."""

    def __init__(self, config: GuardConfig, state: GuardState | None = None) -> None:
        self.config, self.state = config, state or GuardState()

    def judge_loss(self, loss: float) -> tuple[Verdict, float]:
        """Return the verdict on a step's loss over the global batch, and its z-score among the losses in the window."""
        return self._verdict(loss, self.state.losses)

    def judge_gradient_norm(self, norm: float) -> tuple[Verdict, float]:
        """Return the verdict on the global gradient norm, and its z-score among the norms in the window."""
        return self._verdict(norm, self.state.gradient_norms)

    def count_skip(self, step: int) -> bool:
        """Record that `step` is skipped. Return whether the budget allows it."""
        recent = [s for s in self.state.skipped if s > step - self.config.skip_window] + [step]
        if len(recent) > self.config.skip_budget:
            return False  # Not recorded: a run that resumes with a larger budget meets this step again.
        self.state.skipped = recent
        self.state.num_skipped += 1
        return True

    def _verdict(self, value: float, history: list[float]) -> tuple[Verdict, float]:
        if not math.isfinite(value):
            return "not finite", math.nan
        z = 0.0
        if len(history) >= _LEAST_HISTORY:
            deviation = statistics.pstdev(history)
            z = (value - statistics.fmean(history)) / max(deviation, 1e-12 * abs(value), 1e-300)
        history.append(value)
        del history[: -self.config.spike_window]
        if self.config.spike_zscore and z > self.config.spike_zscore:
            self.state.num_spikes += 1
            return "spike", z
        return "fine", z


def dump_micro_batch(
    output: Path, step: int, rank: int, number: int, batch: PackedBatch, losses: list[str], samples: list[str]
) -> Path:
    """Write a micro-batch to `guard/step-…-rank-….pt` as nested dicts of tensors and names, for `torch.load`.

    Args:
        output: The run's output directory.
        step: Index of the step.
        rank: Rank that holds the micro-batch.
        number: Index of the micro-batch in the step.
        batch: The micro-batch.
        losses: Names of the losses that are not finite.
        samples: Names of the samples that cause them.

    Returns:
        Path of the file.
    """
    path = output / FOLDER / f"step-{step:08d}-rank-{rank}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "step": step, "rank": rank, "micro_batch": number, "not_finite": losses, "samples": samples, "batch": _plain(batch)
    }  # fmt: skip
    with atomic_file(path) as temporary:
        torch.save(content, temporary)
    return path


def dump_sample_names(output: Path, step: int, names_by_rank: list[list[str]], write: bool) -> Path:
    """Write the names of the step's samples to `guard/step-….json`, for a step that no single micro-batch explains.

    Args:
        output: The run's output directory.
        step: Index of the step.
        names_by_rank: Names of the samples of each rank.
        write: Whether this rank writes the file.

    Returns:
        Path of the file, on every rank.
    """
    path = output / FOLDER / f"step-{step:08d}.json"
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"step": step, "samples_by_rank": names_by_rank})
    return path


def differing_parameter(module: nn.Module, group: ProcessGroup) -> str | None:
    """Return the name of the first parameter that differs in any bit between ranks, or None.

    This is a collective call.

    It applies to stages 0 to 2, where every rank holds every parameter.
    """
    names = [name for name, _ in module.named_parameters()]
    sums = torch.stack([_bit_sum(parameter) for parameter in module.parameters()]).cpu()
    every = group.gather(sums.tolist())
    for number, name in enumerate(names):
        if any(sums[number] != every[0][number] for sums in every[1:]):
            return name
    return None


def _bit_sum(parameter: torch.Tensor) -> torch.Tensor:
    """Return an int64 checksum that changes with any bit of the tensor.

    It is the sum of the tensor's words, each multiplied by an odd number unique to its position.
    """
    flat = parameter.detach().contiguous().flatten()
    words = flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)
    places = torch.arange(len(words), device=words.device, dtype=torch.int64).mul_(2).add_(1)
    return (words.long() * places).sum()


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return list(value) if isinstance(value, tuple) else value
