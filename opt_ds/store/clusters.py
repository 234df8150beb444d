"""Clusters of region features: the classes of MRC where the image extractor has none.

    <store>/image_clusters-<hash>.safetensors    centres [K, Dv], mean and std [Dv], float32; the extractor's fingerprint

The clusters are kept with the store, and with the processor files of a model, so that images that come later get the same
classes. store.json names them under extractors.image_labels, by the hash of their file.

Shape letters: K clusters, R regions, Dv feature size.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.files import atomic_file
from opt_ds.store.foreign import check_inside

if TYPE_CHECKING:
    import torch

#: Key of `extractors` in store.json.
IMAGE_LABELS = "image_labels"
#: Most clusters: labels are int16.
MAX_CLUSTERS = 2**15
CLUSTER_FILES = "image_clusters-*.safetensors"
_ARRAYS = ("centres", "mean", "std")
_BLOCK_ROWS = 65_536
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Clusters:
    """Cluster centres of standardised region features.

    `centres` is [K, Dv]; `mean` and `std` [Dv] standardise a feature; all are float32. `extractor` is the fingerprint of the
    image extractor whose features were clustered.
    """

    centres: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    extractor: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Number of clusters."""
        return len(self.centres)

    def labels(self, features_rv: np.ndarray) -> np.ndarray:
        """Return the nearest cluster of each region, int16 [R] (Euclidean distance of standardised features)."""
        import torch  # takes seconds to import

        from opt_ds.ops.kmeans import nearest

        centres = torch.from_numpy(self.centres)
        blocks = (features_rv[start : start + _BLOCK_ROWS] for start in range(0, len(features_rv), _BLOCK_ROWS))
        parts = [nearest(standardised(block, self.mean, self.std), centres).numpy() for block in blocks]
        return np.concatenate([np.zeros(0, "int16"), *parts]).astype("int16")

    def fingerprint(self) -> dict[str, Any]:
        """Return what store.json records: the number of clusters and the hash of their file."""
        return {"name": "kmeans", "num_classes": self.num_classes, "sha256": hashlib.sha256(self._content()).hexdigest()}

    def save(self, folder: Path) -> None:
        """Write the file of the clusters into a folder, atomically. Equal clusters have equal bytes."""
        with atomic_file(folder / clusters_file(self.fingerprint())) as temporary:
            temporary.write_bytes(self._content())

    def _content(self) -> bytes:
        from safetensors.numpy import save

        # The order of several entries of metadata would be random.
        return save({name: getattr(self, name) for name in _ARRAYS}, {"extractor": json.dumps(self.extractor, sort_keys=True)})


def standardised(features_rv: np.ndarray, mean: np.ndarray, std: np.ndarray) -> "torch.Tensor":
    """Return features with mean 0 and deviation 1, float32 [R, Dv]. A dimension without deviation is only centred."""
    import torch

    return torch.from_numpy((np.asarray(features_rv, "float32") - mean) / np.where(std > 0, std, 1).astype("float32"))


def clusters_file(fingerprint: Mapping[str, Any]) -> str:
    """Return the name of the file of the clusters with this fingerprint."""
    return f"image_clusters-{str(fingerprint['sha256'])[:16]}.safetensors"


def load_clusters(folder: Path, extractors: Mapping[str, Mapping[str, Any]]) -> Clusters | None:
    """Load the clusters of a store or of a model's processor files.

    Args:
        folder: The folder.
        extractors: The fingerprints in its description.

    Returns:
        The clusters; None if its region labels are none of clusters.

    Raises:
        UserError: The file is missing, damaged, or of other clusters.
    """
    if IMAGE_LABELS not in extractors:
        return None
    recorded = extractors[IMAGE_LABELS]
    remedy = "restore it, or make the labels again (opt-ds update --modality image_labels --extractor kmeans:K)"
    if not _SHA256.fullmatch(str(recorded.get("sha256"))):
        raise UserError(f"{folder}: extractors.{IMAGE_LABELS} in its description is damaged: {remedy}")
    file = folder / clusters_file(recorded)
    if not file.is_file():
        raise UserError(f"{file}: missing, the clusters of the region labels: {remedy}")
    check_inside(folder, file)
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != recorded["sha256"]:
        raise UserError(f"{file}: damaged (its SHA-256 differs from the recorded one): {remedy}")
    try:
        return _clusters_of(content)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{file}: not a file of clusters: {remedy}") from None


def clusters_problem(folder: Path, extractors: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return why the clusters of a store's region labels cannot be used; None if they can, or if there are none."""
    try:
        load_clusters(folder, extractors)
    except UserError as error:
        return str(error)
    return None


def remove_other_clusters(folder: Path, extractors: Mapping[str, Mapping[str, Any]]) -> None:
    """Remove files of clusters that the description does not name. They are left by updates."""
    kept = clusters_file(extractors[IMAGE_LABELS]) if IMAGE_LABELS in extractors else None
    for pattern in (CLUSTER_FILES, f".{CLUSTER_FILES}.*.tmp"):
        for file in folder.glob(pattern):
            if file.name != kept:
                file.unlink()


def _clusters_of(content: bytes) -> Clusters:
    """Return the clusters of a file's content. Raise KeyError, TypeError or ValueError for another content."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    clusters = Clusters(**arrays, extractor=json.loads(header["__metadata__"]["extractor"]))
    size = clusters.centres.shape[1:]
    is_float32 = all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays.values())
    if not (is_float32 and len(size) == 1 and clusters.mean.shape == clusters.std.shape == size):
        raise ValueError("arrays of other sizes")
    if not 2 <= len(clusters.centres) <= MAX_CLUSTERS or not isinstance(clusters.extractor, dict):
        raise ValueError("another number of clusters")
    return clusters
