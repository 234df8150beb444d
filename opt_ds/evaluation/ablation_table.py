"""Output of the ablation: JSON, a Markdown table and a bar chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opt_ds.evaluation import paper
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


def ablation_markdown(figures: dict[str, Any]) -> str:
    """Return the table as Markdown.

    Each row has the trained losses, mAP per input, and the relative change from the full run next to the paper's.
    """
    rows = figures["rows"]
    subsets = list(rows[0]["classification"]["subsets"])
    full = next((row for row in rows if row["row"] == FULL), None)
    columns = ["pre-training", "losses that ran", *(f"mAP {subset}" for subset in subsets), "change", "paper's change"]
    lines = [_cells(columns), _cells(["---"] * len(columns))]
    for row in rows:
        own = [row["classification"]["subsets"][subset]["mAP"] for subset in subsets]
        change = in_paper = ""
        if full is not None and row is not full:
            change = f"{100 * (own[-1] / full['classification']['subsets'][subsets[-1]]['mAP'] - 1):+.1f} %"
            in_paper = f"{paper.ABLATION[row['row']]:+.1f} %" if row["row"] in paper.ABLATION else ""
        values = [f"{100 * value:.1f}" for value in own]
        lines.append(_cells([row["row"], ", ".join(row["losses"]) or "none", *values, change, in_paper]))
    first = rows[0]["classification"]
    lines += [
        "",
        f"Linear probe on the frozen [CLS]: mAP in per cent over {first['labels']} labels, {first['test_samples']} samples of "
        f"`{first['split']}` ({first['train_samples']} to fit on); chance {100 * first['chance']:.1f}. Every run: preset "
        f"{figures['preset']}, seed {figures['seed']}, {max(row['steps'] for row in rows)} steps of {figures['batch']['size']} "
        f"{figures['batch']['unit']}. The change is relative to the full run, of {subsets[-1]}.",
    ]
    return "\n".join(lines) + "\n"


def _draw_chart(figures: dict[str, Any], path: Path) -> None:
    """Draw one horizontal bar per row for the mAP of the last subset, and a line for the full run."""
    from matplotlib.figure import Figure

    rows = figures["rows"][::-1]
    subset = list(rows[0]["classification"]["subsets"])[-1]
    values = {row["row"]: 100 * row["classification"]["subsets"][subset]["mAP"] for row in rows}
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
