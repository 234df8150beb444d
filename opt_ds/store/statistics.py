"""Mean and standard deviation of the features over the train split, summed shard by shard in float64."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from opt_ds.store.schema import MISSING, Dims, Statistics

TRAIN_SPLIT = "train"
_COLUMNS = ((1, "image"), (2, "audio"))


def train_sums(arrays: dict[str, np.ndarray], train_code: int | None) -> dict[str, Any]:
    """Return count, sum and sum of squares of a shard's features that train samples use, each row counted once."""
    rows = arrays["samples/rows"][arrays["samples/split"] == train_code]
    sums = {}
    for column, name in _COLUMNS:
        used = np.unique(rows[:, column])
        used = used[used != MISSING]
        lengths = np.diff(arrays[f"{name}/offsets"])
        chosen = np.repeat(np.isin(np.arange(len(lengths)), used), lengths)
        features = arrays[f"{name}/features"][chosen].astype("float64")
        sums[name] = {
            "count": len(features),
            "sum": features.sum(0).tolist(),
            "square_sum": np.square(features).sum(0).tolist(),
        }
    return sums


def statistics_of(sums: Sequence[dict[str, Any]], dims: Dims) -> dict[str, Statistics]:
    """Return the statistics of "image" and "audio" over the shards' sums."""
    sizes = {"image": dims.image_feature_dim, "audio": dims.audio_feature_dim}
    return {name: _statistics([part[name] for part in sums], size) for name, size in sizes.items()}


def _statistics(sums: Sequence[dict[str, Any]], size: int) -> Statistics:
    count = sum(part["count"] for part in sums)
    if count == 0:
        return Statistics(mean=[0.0] * size, std=[1.0] * size, count=0)
    mean = np.sum([part["sum"] for part in sums], axis=0) / count
    variance = np.sum([part["square_sum"] for part in sums], axis=0) / count - np.square(mean)
    return Statistics(mean=mean.tolist(), std=np.sqrt(np.maximum(variance, 0)).tolist(), count=count)
