"""Output of the ablation: JSON, a Markdown table and a bar chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opt_ds.evaluation import paper
from opt_ds.evaluation.intervals import Interval, interval_of_few
from opt_ds.store.files import atomic_file, write_json

ABLATION_SCHEMA = 1
FULL, UNTRAINED = "full", "untrained"
JSON_FILE, MARKDOWN_FILE, CHART_FILE = "ablation.json", "ablation.md", "ablation.png"


def write_ablation_table(figures: dict[str, Any], folder: Path) -> None:
    """Write ablation.json, ablation.md and ablation.png into `folder`."""
    write_json(folder / JSON_FILE, figures)
    with atomic_file(folder / MARKDOWN_FILE) as temporary:
        temporary.write_text(ablation_markdown(figures), encoding="utf-8")
    with atomic_file(folder / CHART_FILE) as temporary:
        _draw_chart(figures, temporary)


class TableRow(NamedTuple):
    """A row of the table: the mean over its runs, one per seed.

    Attributes:
        name: Name of the row.
        losses: The losses that ran.
        scores: Subset -> mean mAP.
        seeds: Number of runs.
        change: Mean change of the last subset's mAP from the full run of the same seed, in per cent; None: unknown.
        interval: Its 95 % interval over the seeds; None with a single seed.
        paper: The paper's change; None: unknown.
    """

    name: str
    losses: list[str]
    scores: dict[str, float]
    seeds: int
    change: float | None
    interval: Interval | None
    paper: float | None

    @property
    def change_text(self) -> str:
        """The change with its interval and the mark of an unsure one."""
        if self.change is None:
            return ""
        if self.interval is None:
            return f"{self.change:+.1f} % {ONE_TRAINING}"
        low, high = self.interval
        return f"{self.change:+.1f} % [{low:+.1f}, {high:+.1f}]" + (f" {INCLUDES_ZERO}" if low <= 0 <= high else "")


#: Marks of changes that the runs do not show, and what they mean.
INCLUDES_ZERO, ONE_TRAINING = "≈", "?"
_MARKS = {
    INCLUDES_ZERO: "the 95 % interval over the seeds includes 0",
    ONE_TRAINING: "one training each, so the seed may cause the change (--seeds 3)",
}


def table_rows(figures: dict[str, Any]) -> list[TableRow]:
    """Return the rows of the table. Runs of several seeds are one row."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for run in figures["rows"]:
        by_name.setdefault(run["row"], {})[run.get("seed", figures["seed"])] = run
    full, rows = by_name.get(FULL, {}), []
    for name, runs in by_name.items():
        subsets = next(iter(runs.values()))["classification"]["subsets"]
        scores = {subset: float(np.mean([_score(run, subset) for run in runs.values()])) for subset in subsets}
        judged = list(subsets)[-1]
        changes = np.array([
            100 * (_score(run, judged) / _score(full[seed], judged) - 1) for seed, run in runs.items() if seed in full
        ])  # fmt: skip
        known = name != FULL and len(changes) > 0
        rows.append(TableRow(
            name, list(dict.fromkeys(loss for run in runs.values() for loss in run["losses"])), scores, len(runs),
            float(changes.mean()) if known else None, interval_of_few(changes) if known else None, paper.ABLATION.get(name),
        ))  # fmt: skip
    return rows


def _score(run: dict[str, Any], subset: str) -> float:
    return run["classification"]["subsets"][subset]["mAP"]


def ablation_markdown(figures: dict[str, Any]) -> str:
    """Return the table as Markdown.

    Each row has the trained losses, mAP per input, and the relative change from the full run next to the paper's.
    """
    rows = table_rows(figures)
    subsets = list(rows[0].scores)
    columns = ["pre-training", "losses that ran", *(f"mAP {subset}" for subset in subsets), "change", "paper's change"]
    lines = [_cells(columns), _cells(["---"] * len(columns))]
    for row in rows:
        values = [f"{100 * value:.1f}" for value in row.scores.values()]
        in_paper = f"{row.paper:+.1f} %" if row.paper is not None and row.change is not None else ""
        lines.append(_cells([row.name, ", ".join(row.losses) or "none", *values, row.change_text, in_paper]))
    first, seeds = figures["rows"][0]["classification"], figures.get("seeds", [figures["seed"]])
    lines += [
        "",
        f"Linear probe on the frozen [CLS]: mAP in per cent over {first['labels']} labels, {first['test_samples']} samples of "
        f"`{first['split']}` ({first['train_samples']} to fit on); chance {100 * first['chance']:.1f}. Every run: preset "
        f"{figures['preset']}, seed {', '.join(map(str, seeds))}, {max(row['steps'] for row in figures['rows'])} steps of "
        f"{figures['batch']['size']} {figures['batch']['unit']}. The change is relative to the full run of the same seed, of "
        f"{subsets[-1]}." + marks_text(rows),
    ]
    return "\n".join(lines) + "\n"


def marks_text(rows: Sequence[TableRow]) -> str:
    """Return what the marks in these rows mean, as sentences with a space before each."""
    return "".join(f" {mark}: {meaning}." for mark, meaning in _MARKS.items() if any(mark in row.change_text for row in rows))


def _draw_chart(figures: dict[str, Any], path: Path) -> None:
    """Draw one horizontal bar per row for the mAP of the last subset, and a line for the full run."""
    from matplotlib.figure import Figure

    rows = table_rows(figures)[::-1]
    subset = list(rows[0].scores)[-1]
    values = {row.name: 100 * row.scores[subset] for row in rows}
    figure = Figure(figsize=(7, 0.6 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = ["#1f6feb" if name == FULL else "#c9d1d9" if name == UNTRAINED else "#79b8ff" for name in values]
    bars = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    if FULL in values:
        axes.axvline(values[FULL], color="#1f6feb", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1.1 * max(values.values()))
    axes.set_xlabel(f"classification mAP, {subset}, per cent")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")


def _cells(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"
