"""Lengths of a store's items (tokens per text, regions per image, frames per audio row) as numbers and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.store.index import ShardFile
from opt_ds.store.schema import MODALITIES

LENGTHS_FILE = "lengths.png"
UNITS = {"text": "tokens", "image": "regions", "audio": "frames"}
_MOST_BINS = 50


def shard_lengths(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Return tokens per text, regions per image and frames per audio row of some shards, as int64 arrays."""
    parts: dict[str, list[np.ndarray]] = {kind: [np.zeros(0, "int64")] for kind in MODALITIES}
    for file in files:
        shard = ShardFile(file)
        for kind in MODALITIES:
            parts[kind].append(np.diff(shard.array(f"{kind}/offsets")[:]))
    return {kind: np.concatenate(arrays) for kind, arrays in parts.items()}


def length_summary(values: np.ndarray) -> dict[str, Any]:
    """Return rows, min, median, mean, p95, max and a histogram (counts, edges)."""
    if not len(values):
        return {"rows": 0}
    counts, edges = np.histogram(values, bins=_edges(values))
    return {
        "rows": len(values),
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": round(float(values.mean()), 3),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }


def draw_lengths(lengths: dict[str, np.ndarray], path: Path) -> None:
    """Write a PNG with one histogram per modality, side by side. The median is a vertical line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, (kind, values) in zip(figure.subplots(1, len(lengths)), lengths.items(), strict=True):
        axes.set_title(f"{kind}: {len(values)} rows")
        axes.set_xlabel(f"{UNITS[kind]} a row")
        if len(values):
            axes.hist(values, bins=_edges(values), color="#4c72b0")
            axes.axvline(float(np.median(values)), color="black", linewidth=1)
    figure.savefig(path, dpi=100, format="png", metadata={"Software": None})


def _edges(values: np.ndarray) -> np.ndarray:
    """Return bin edges such that every bin covers the same number of integer lengths."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // _MOST_BINS)
    return np.arange(low, high + width + 1, width)
