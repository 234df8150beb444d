"""Region features that are made already: `.npz` files as UNITER (Chen et al. 2020) publishes them, a picture each.

features [R, Dv] float16, norm_bb [R, 6 or 7] (x1, y1, x2, y2, w, h[, w*h] in 0..1), conf [R] best first, and soft_labels
[R, K] (where absent, class 0). The same selection as UNITER: confidence over 0.2, at least 10, at most 100 regions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.prepare.npz_arrays import read_npz_arrays
from opt_ds.prepare.regions import RegionFeatures, boxes_with_size


class NpzExtractor:
    """Reads `.npz` files where other extractors look at pictures; the manifest's `image` names them."""

    name = "npz"
    reads_files = True

    def __init__(
        self,
        *,
        dim: int = 2048,
        num_classes: int = 1601,
        confidence: float = 0.2,
        min_regions: int = 10,
        max_regions: int = 100,
    ) -> None:
        self.dim, self.num_classes = dim, num_classes
        self._settings = {"confidence": confidence, "min_regions": min_regions, "max_regions": max_regions}

    def identity(self) -> dict[str, Any]:
        """Return what the features depend on, besides the files."""
        return {"name": self.name, "dim": self.dim, "num_classes": self.num_classes, "weights_sha256": None, **self._settings}

    def extract(self, inputs: Sequence[Path | None]) -> list[RegionFeatures | None]:
        """Return each file's regions. ValueError for a file of other arrays or sizes."""
        return [None if path is None else self._read(path) for path in inputs]

    def _read(self, path: Path) -> RegionFeatures:
        arrays = read_npz_arrays(path)
        absent = [name for name in ("features", "norm_bb", "conf") if name not in arrays]
        if absent:
            raise ValueError(f"{path.name} has no array {absent[0]}")
        features, boxes, scores = arrays["features"], arrays["norm_bb"], arrays["conf"].reshape(-1)
        soft = arrays.get("soft_labels")
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"{path.name}: features of shape {list(features.shape)}, not [R, {self.dim}]")
        if soft is not None and (soft.ndim != 2 or len(soft) != len(features)):
            raise ValueError(f"{path.name}: soft_labels of shape {list(soft.shape)}, not [{len(features)}, K]")
        if soft is not None and soft.shape[1] > self.num_classes:
            raise ValueError(f"{path.name}: {soft.shape[1]} classes, not {self.num_classes}")
        if not len(features) == len(boxes) == len(scores):
            raise ValueError(f"{path.name}: {len(features)} features, {len(boxes)} boxes, {len(scores)} scores")
        confident = int((scores > self._settings["confidence"]).sum())
        kept = slice(0, min(max(confident, self._settings["min_regions"]), self._settings["max_regions"]))
        labels = np.zeros(len(features), "int16") if soft is None else soft.argmax(1).astype("int16")
        return RegionFeatures(
            features[kept].astype("float16"),
            boxes_with_size(boxes[kept, :4]),
            labels[kept],
            np.clip(scores[kept], 0, 1).astype("float16"),
        )
