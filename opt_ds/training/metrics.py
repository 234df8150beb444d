"""Output of a run: TensorBoard, metrics.jsonl, the progress bar and the validation table. Only rank 0 writes it."""

import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from opt_ds.config import TasksConfig
from opt_ds.store.files import is_disk_full
from opt_ds.tasks.base import LossTerm

METRICS_FILE, VALIDATION_FILE = "metrics.jsonl", "validation.json"


class TermSums:
    """Sums of losses and their metrics over micro-batches. They stay on the device and are read in one transfer."""

    def __init__(self) -> None:
        self._names: list[tuple[str, str]] = []  # (loss, "loss" or the name of a metric)
        self._total: torch.Tensor | None = None
        self.counts: dict[str, float] = {}
        self.divisors: dict[str, float] = {}

    def add(self, terms: dict[str, LossTerm]) -> torch.Tensor:
        """Add a micro-batch's terms. Return its vector of values (float64, detached)."""
        found = {(loss, "loss"): term.sum.detach() for loss, term in terms.items()}
        found |= {(loss, name): value for loss, term in terms.items() for name, value in term.metrics.items()}
        vector = torch.stack([value.double() for value in found.values()])
        self._names = list(found)
        self._total = vector if self._total is None else self._total + vector
        return vector

    def add_counts(self, counts: dict[str, float], divisors: dict[str, float]) -> None:
        """Add a step's global counts and divisors."""
        for total, numbers in ((self.counts, counts), (self.divisors, divisors)):
            for loss, number in numbers.items():
                total[loss] = total.get(loss, 0.0) + number

    def weighted(self, means: dict[str, float], tasks: TasksConfig) -> float:
        """Return the total loss that `tasks.reduction` and the weights define, from the losses' means over their terms."""
        return sum(
            tasks.loss_weight(loss) * mean * (self.counts[loss] / self.divisors[loss]) for loss, mean in means.items()
        )

    def include(self, other: "TermSums") -> None:
        """Add the micro-batches and counts of another TermSums."""
        if other._total is not None:
            self._names = other._names
            self._total = other._total if self._total is None else self._total + other._total
        self.add_counts(other.counts, other.divisors)

    def vector(self) -> torch.Tensor:
        """Return this rank's sums (float64), empty if nothing was added."""
        return torch.zeros(0, dtype=torch.float64) if self._total is None else self._total

    def means(self, vector: torch.Tensor) -> dict[tuple[str, str], float]:
        """Return (loss, "loss" or metric) -> mean over the counted terms, for a vector of sums over all ranks.

        Losses with count 0 are omitted. The metric "correct" becomes "accuracy".
        """
        values = dict(zip(self._names, vector.tolist(), strict=True))
        return {
            (loss, "accuracy" if name == "correct" else name): value / self.counts[loss]
            for (loss, name), value in values.items()
            if self.counts.get(loss)
        }

    def non_finite(self, vector: torch.Tensor) -> list[str]:
        """Return the losses in a micro-batch's vector that are NaN or infinite."""
        values = zip(self._names, vector.tolist(), strict=True)
        return [loss for (loss, name), value in values if name == "loss" and not math.isfinite(value)]


class Reporter:
    """Writes scalars, texts and images of one run, and shows its progress bar. Does nothing unless `enabled`."""

    def __init__(self, output: Path, first_step: int, last_step: int, enabled: bool) -> None:
        self.enabled, self.output = enabled, output
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        _drop_later_lines(output / METRICS_FILE, first_step)
        self._jsonl = open(output / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 - open for as long as the run lasts
        _keep_full_disk_quiet()
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)
        self._steps = (first_step, last_step)
        self._bar: tqdm | None = None

    def advance(self, status: dict[str, str] | None = None) -> None:
        """Advance the progress bar by one step and show `status` after it."""
        if self.enabled:
            if self._bar is None:  # created after the first step, because earlier log lines would break the bar
                self._bar = _progress_bar(*self._steps)
            if status is not None:
                self._bar.set_postfix(status, refresh=False)
            self._bar.update(1)

    def scalars(self, step: int, values: dict[str, float], kind: str) -> None:
        """Write named values after `step` steps to TensorBoard and, as one JSON line, to metrics.jsonl."""
        if not self.enabled:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        line = {"step": step, "kind": kind, **{k: v if math.isfinite(v) else str(v) for k, v in values.items()}}
        self._jsonl.write(json.dumps(line) + "\n")
        self._jsonl.flush()

    def text(self, name: str, markdown: str) -> None:
        """Write a text for TensorBoard's text tab."""
        if self.enabled:
            self._board.add_text(name, markdown)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Write an image, uint8 [H, W, 3], to TensorBoard."""
        if self.enabled:
            self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Close the progress bar and the files."""
        if self.enabled:
            if self._bar is not None:
                self._bar.close()
            self._board.close()
            self._jsonl.close()


def _keep_full_disk_quiet() -> None:
    """Suppress the traceback of TensorBoard's thread when the disk is full.

    The next call in the main thread raises the error.
    """
    others = threading.excepthook
    if getattr(others, "keeps_full_disk_quiet", False):
        return

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not (isinstance(arguments.exc_value, OSError) and is_disk_full(arguments.exc_value)):
            others(arguments)

    hook.keeps_full_disk_quiet = True  # type: ignore[attr-defined]
    threading.excepthook = hook


def _progress_bar(first_step: int, last_step: int) -> tqdm:
    interactive = sys.stderr.isatty()
    return tqdm(
        total=last_step,
        initial=first_step,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if interactive else 20,
        maxinterval=1 if interactive else 60,
        bar_format="{l_bar}{bar:20}{r_bar}",
    )


def validation_table(
    step: int, losses: dict[str, float], baselines: dict[str, float], accuracies: dict[str, float], total: float
) -> str:
    """Return a table of the validation losses and the losses of their trivial baselines.

    Args:
        step: Number of completed steps.
        losses: Loss name -> validation loss.
        baselines: Loss name -> loss of the baseline, where there is one.
        accuracies: Loss name -> accuracy, where the task classifies.
        total: The weighted validation loss.
    """
    lines = [
        f"validation after step {step}: weighted loss {total:.4f}",
        f"  {'task':<10}{'loss':>9}{'baseline':>10}{'accuracy':>10}",
    ]
    for loss, value in losses.items():
        baseline = f"{baselines[loss]:.4f}" if loss in baselines else "–"
        accuracy = f"{accuracies[loss]:.1%}" if loss in accuracies else ""
        lines.append(f"  {loss:<10}{value:>9.4f}{baseline:>10}{accuracy:>10}")
    return "\n".join(lines)


def settings_table(values: dict[str, Any]) -> str:
    """Return a Markdown table for TensorBoard's text tab."""
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in values.items())])


def _drop_later_lines(path: Path, step: int) -> None:
    """Remove the lines that an interrupted run logged after the checkpoint from which it resumes."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a truncated line
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
