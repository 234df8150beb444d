"""Mean and standard deviation of the features over the train split, summed per shard in float64."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from opt_ds.store.further import FurtherModality
from opt_ds.store.index import ShardFile
from opt_ds.store.schema import MODALITIES, Dims, Statistics, StoreDescription, feature_dims_of

TRAIN_SPLIT = "train"
_BLOCK_ROWS = 8192
_TOLERANCE = 1e-6  # relative to a feature's root mean square; far above rounding from another order of summation


def summed_datasets(further: Iterable[str]) -> list[str]:
    """Return the names of the datasets that `train_sums` reads."""
    names = (f"{name}/{dataset}" for name in _with_features(further).values() for dataset in ("offsets", "features"))
    return ["samples/rows", "samples/split", *names]


def train_sums(arrays: dict[str, np.ndarray], train_code: int | None, further: Iterable[str] = ()) -> dict[str, Any]:
    """Return count, sum and sum of squares of the features of a shard's train samples. Each row is counted once.

    Args:
        arrays: The datasets of the shard, at least those of `summed_datasets`.
        train_code: Code of the train split; None if there is none.
        further: Names of the further modalities, in the store's order.
    """
    rows = arrays["samples/rows"][arrays["samples/split"] == train_code]
    sums = {}
    for column, name in _with_features(further).items():
        chosen = items_of_rows(rows[:, column], arrays[f"{name}/offsets"])
        features = arrays[f"{name}/features"][chosen].astype("float64")
        sums[name] = {
            "count": len(features),
            "sum": features.sum(0).tolist(),
            "square_sum": np.square(features).sum(0).tolist(),
        }
    return sums


def items_of_rows(rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return which items of a shard are in one of these rows of their modality (-1: none), bool [items]."""
    lengths = np.diff(offsets)
    return np.repeat(np.isin(np.arange(len(lengths)), rows), lengths)


def statistics_of(
    sums: Sequence[dict[str, Any]], dims: Dims, further: Mapping[str, FurtherModality] | None = None
) -> dict[str, Statistics]:
    """Return the statistics of each modality that has features from the sums of all shards."""
    sizes = feature_dims_of(dims, further or {})
    return {name: _statistics([part[name] for part in sums], size) for name, size in sizes.items()}


def _with_features(further: Iterable[str]) -> dict[int, str]:
    """Return the modalities that have features by their column of samples/rows."""
    return {column: name for column, name in enumerate((*MODALITIES, *further)) if name != "text"}


def _statistics(sums: Sequence[dict[str, Any]], size: int) -> Statistics:
    count = sum(part["count"] for part in sums)
    zeros = np.zeros(size)
    total = np.sum([part["sum"] for part in sums], axis=0) if count else zeros
    squares = np.sum([part["square_sum"] for part in sums], axis=0) if count else zeros
    mean, std = mean_and_std(count, total, squares)
    return Statistics(mean=mean.tolist(), std=std.tolist(), count=count)


def statistics_problem(
    files: Sequence[ShardFile], name: str, train_code: int | None, description: StoreDescription
) -> str | None:
    """Return why the recorded statistics of a modality's features differ from the shards; None if they do not.

    The sums are computed again, block by block.

    Args:
        files: The open shards.
        name: The modality.
        train_code: Code of the train split; None if there is none.
        description: The store's description, with the recorded statistics.
    """
    recorded, column = description.statistics[name], description.modalities.index(name)
    count, total, squares = 0, np.zeros(len(recorded.mean)), np.zeros(len(recorded.mean))
    for file in files:
        rows = file.array("samples/rows")[:][file.array("samples/split")[:] == train_code][:, column]
        chosen = items_of_rows(rows, file.array(f"{name}/offsets")[:])
        features = file.array(f"{name}/features")
        for start in range(0, len(features), _BLOCK_ROWS):
            block = features[start : start + _BLOCK_ROWS][chosen[start : start + _BLOCK_ROWS]].astype("float64")
            count, total, squares = count + len(block), total + block.sum(0), squares + np.square(block).sum(0)
        file.release_pages()
    if count != recorded.count:
        return f"statistics.{name}: over {recorded.count} vectors, the train split has {count}"
    found = mean_and_std(count, total, squares)
    mean, std = np.array(recorded.mean), np.array(recorded.std)
    scale = np.sqrt(np.square(found[0]) + np.square(found[1])) + 1e-12
    off = (np.abs(mean - found[0]) > _TOLERANCE * scale) | (
        np.abs(np.square(std) - np.square(found[1])) > _TOLERANCE * np.square(scale)
    )
    return f"statistics.{name}: dimension {int(np.flatnonzero(off)[0])} differs from the features" if off.any() else None


def mean_and_std(count: int, total: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation; 0 and 1 if there are no vectors."""
    if count == 0:
        return np.zeros_like(total), np.ones_like(total)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - np.square(mean), 0))
