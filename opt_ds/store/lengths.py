"""Lengths of a store's rows (tokens per text, regions per image, frames per audio row) as numbers and as a plot."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.store.index import ShardFile
from opt_ds.store.schema import MODALITIES, units_of

LENGTHS_FILE = "lengths.png"
UNITS = units_of({})
_MOST_BINS = 50


def shard_lengths(files: Sequence[Path], modalities: Iterable[str] = MODALITIES) -> dict[str, np.ndarray]:
    """Return the number of items of each row of some shards by modality, as int64 arrays.

    `modalities` are those of the store.
    """
    parts: dict[str, list[np.ndarray]] = {kind: [np.zeros(0, "int64")] for kind in modalities}
    for file in files:
        shard = ShardFile(file)
        for kind, arrays in parts.items():
            arrays.append(np.diff(shard.array(f"{kind}/offsets")[:]))
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


def draw_lengths(lengths: dict[str, np.ndarray], path: Path, units: Mapping[str, str] = UNITS) -> None:
    """Write a PNG with one histogram per modality, side by side. The median is a vertical line.

    `units` is the plural word for the items of each modality.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(lengths), 3.2), layout="constrained")
    for axes, (kind, values) in zip(figure.subplots(1, len(lengths)), lengths.items(), strict=True):
        axes.set_title(f"{kind}: {len(values)} rows")
        axes.set_xlabel(f"{units[kind]} per row")
        if len(values):
            axes.hist(values, bins=_edges(values), color="#4c72b0")
            axes.axvline(float(np.median(values)), color="black", linewidth=1)
    figure.savefig(path, dpi=100, format="png", metadata={"Software": None})


def _edges(values: np.ndarray) -> np.ndarray:
    """Return bin edges such that every bin covers the same number of integer lengths."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // _MOST_BINS)
    return np.arange(low, high + width + 1, width)
