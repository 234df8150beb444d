"""Labels of image regions by k-means, for extractors without classes: find the clusters, and label shards.

`--image-labels kmeans:1024` finds 1,024 clusters of the training split's regions. `--image-labels FOLDER` takes those of
another store, or of a model's processor files, so that both have the same classes. All of it runs on one thread of a CPU, so
the labels do not depend on the number of cores.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.features.extractors import difference
from opt_ds.store.clusters import (
    IMAGE_LABELS,
    MAX_CLUSTERS,
    Clusters,
    load_clusters,
    remove_other_clusters,
    standardised,
)
from opt_ds.store.files import exclusive_use
from opt_ds.store.index import ShardFile
from opt_ds.store.processor_files import PROCESSOR_FILE, PROCESSOR_FOLDER, load_processor_description
from opt_ds.store.schema import MODALITIES, STORE_FILE, StoreDescription, load_description
from opt_ds.store.statistics import TRAIN_SPLIT, items_of_rows, mean_and_std
from opt_ds.store.update import Arrays, rewrite_shards
from opt_ds.store.verify import open_store
from opt_ds.store.writer import StoreWriter

_LOG = logging.getLogger(__name__)
_METHOD = "kmeans"
_IMAGE = MODALITIES.index("image")
_REGIONS_PER_CLUSTER = 128  # more regions are sampled; the clusters of faiss use at most 256
_ITERATIONS = 25  # as faiss
_SEED = 0
_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class LabelSource:
    """Where the labels come from: the number of clusters to find, or clusters that exist.

    `clusters` is None if they are to be found.
    """

    num_classes: int
    clusters: Clusters | None = None

    @property
    def identity(self) -> str:
        """What identifies the labels in the key of a preparation."""
        return f"{_METHOD}:{self.num_classes}" if self.clusters is None else str(self.clusters.fingerprint()["sha256"])


def label_source(given: str, option: str, extractor: Mapping[str, Any], feature_dim: int) -> LabelSource:
    """Return the source that the user names.

    Args:
        given: `kmeans:K`, or a folder: a store, a run or an exported model.
        option: The option that names it, for messages.
        extractor: Fingerprint of the image extractor whose regions are labelled.
        feature_dim: Size of its features.

    Raises:
        UserError: It is neither of them, K is out of range, or the folder's clusters are of another extractor.
    """
    name, colon, count = given.partition(":")
    folder = Path(given).expanduser()
    if name == _METHOD or not folder.exists():
        if not (name == _METHOD and colon and count.isascii() and count.isdigit() and 2 <= int(count) <= MAX_CLUSTERS):
            raise UserError(
                f'{option} "{given}": write {_METHOD}:K with K from 2 to {MAX_CLUSTERS}, or name the folder of a store whose '
                "labels are by k-means"
            )
        return LabelSource(int(count))
    clusters = _clusters_in(folder, option)
    if (key := difference(clusters.extractor, extractor)) is not None or clusters.centres.shape[1] != feature_dim:
        key = key or "feature size"
        raise UserError(
            f"{option} {given}: its clusters are of features of another image extractor ({key} is "
            f"{clusters.extractor.get(key)}, here {extractor.get(key)}): write {_METHOD}:{clusters.num_classes}"
        )
    return LabelSource(clusters.num_classes, clusters)


def label_shards(
    writer: StoreWriter, num_shards: int, source: str, extractor: dict[str, Any], splits: Sequence[str]
) -> dict[str, Any]:
    """Label the regions of an unfinished store that has all shards.

    An interrupted call can be repeated: equal shards have equal clusters.

    Args:
        writer: The store's writer.
        num_shards: Number of shards.
        source: `LabelSource.identity`. Clusters that exist are in the store's folder.
        extractor: Fingerprint of the image extractor.
        splits: Names of the splits by their codes.

    Returns:
        The fingerprint of the clusters.
    """
    files = [ShardFile(writer.shard_file(index)) for index in range(num_shards)]
    name, _, count = source.partition(":")
    if name == _METHOD:
        # An unfinished store resumes with the settings that it was begun with only.
        remedy = f"choose fewer clusters, and remove {writer.path} or name another --output"
        clusters = find_clusters(files, splits, extractor, int(count), f"{writer.path}: --image-labels {source}", remedy)
    else:
        found = load_clusters(writer.path, {IMAGE_LABELS: {"sha256": source}})
        assert found is not None, "it is in the description"
        clusters = found
    used = np.zeros(clusters.num_classes, "int64")
    with _one_thread():
        for index, file in enumerate(files):
            labels = clusters.labels(file.array("image/features"))
            used += np.bincount(labels, minlength=len(used))
            writer.replace_labels(index, labels)
            file.release_pages()
    clusters.save(writer.path)
    remove_other_clusters(writer.path, {IMAGE_LABELS: clusters.fingerprint()})
    _log_use(writer.path, used)
    return clusters.fingerprint()


def update_image_labels(path: Path, given: str) -> StoreDescription:
    """Label the regions of a finished store, or label them again. The store stays valid throughout.

    Args:
        path: The store's folder.
        given: `kmeans:K`, or the folder of a store whose clusters are taken.

    Returns:
        The new description of the store.
    """
    with exclusive_use(path):
        store = open_store(path, with_dvae=False)
        description = store.description
        if not description.num_rows("image"):
            raise UserError(f"{path}: it has no images, whose regions could be labelled")
        extractor, dims = description.extractors.get("image", {}), description.dims
        source = label_source(given, "--extractor", extractor, dims.image_feature_dim)
        files = [store.shard(index) for index in range(len(description.shards))]
        clusters = source.clusters or find_clusters(
            files, description.split_names, extractor, source.num_classes, f"{path}: --extractor {given}"
        )
        used = np.zeros(clusters.num_classes, "int64")

        def change(index: int, arrays: Arrays) -> Arrays:
            labels = clusters.labels(arrays["image/features"])
            used[:] += np.bincount(labels, minlength=len(used))
            return {**arrays, "image/labels": labels}

        fields = {
            "dims": dims.model_copy(update={"image_num_classes": clusters.num_classes}),
            "extractors": {**description.extractors, IMAGE_LABELS: clusters.fingerprint()},
            "preparation_key": "",
        }
        clusters.save(path)
        try:
            with _one_thread():
                updated = rewrite_shards(store, change, lambda: fields, new_statistics=False)
        finally:
            remove_other_clusters(path, load_description(path).extractors)
        _log_use(path, used)
        return updated


def find_clusters(
    files: Sequence[ShardFile],
    splits: Sequence[str],
    extractor: dict[str, Any],
    num_classes: int,
    where: str,
    remedy: str = "choose fewer clusters",
) -> Clusters:
    """Find the clusters of the training split's regions, standardised, by k-means over a sample of them.

    Args:
        files: The shards of a store.
        splits: Names of the splits by their codes.
        extractor: Fingerprint of the image extractor.
        num_classes: Number of clusters.
        where: Beginning of error messages.
        remedy: End of the message that there are fewer regions than clusters.

    Returns:
        The clusters. Equal shards have equal ones.

    Raises:
        UserError: There are fewer regions than clusters.
    """
    import torch

    from opt_ds.ops.kmeans import kmeans

    chosen = [_training_regions(file, splits) for file in files]
    total = int(sum(own.sum() for own in chosen))
    if total < num_classes:
        raise UserError(f'{where}: the images of split "{TRAIN_SPLIT}" have only {total} regions: {remedy}')
    count = min(total, num_classes * _REGIONS_PER_CLUSTER)
    taken = np.zeros(total, bool)
    taken[np.random.default_rng(_SEED).choice(total, count, replace=False, shuffle=False)] = True
    _LOG.info(f"{where}: k-means over {count} of {total} regions of the training split")
    vectors = np.concatenate(list(_taken(files, chosen, taken)))
    mean, std = _mean_and_std(vectors)
    with _one_thread():
        generator = torch.Generator().manual_seed(_SEED)
        centres = kmeans(standardised(vectors, mean, std), num_classes, _ITERATIONS, generator)
    return Clusters(centres.numpy(), mean, std, extractor)


def _training_regions(file: ShardFile, splits: Sequence[str]) -> np.ndarray:
    """Return which regions of a shard are of images of the training split, bool [R]."""
    train = splits.index(TRAIN_SPLIT) if TRAIN_SPLIT in splits else -1
    rows = file.array("samples/rows")[:][file.array("samples/split")[:] == train][:, _IMAGE]
    return items_of_rows(rows, file.array("image/offsets")[:])


def _taken(files: Sequence[ShardFile], chosen: Sequence[np.ndarray], taken: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the sampled features of each shard. `taken` [total]: which of the chosen regions of all shards are sampled."""
    start = 0
    for file, own in zip(files, chosen, strict=True):
        stop = start + int(own.sum())
        places = np.flatnonzero(own)[taken[start:stop]]
        yield np.asarray(file.array("image/features")[:][places])
        file.release_pages()
        start = stop


def _mean_and_std(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation of each dimension, float32 [Dv], summed block by block in float64."""
    total, squares = np.zeros(vectors.shape[1]), np.zeros(vectors.shape[1])
    for start in range(0, len(vectors), _BLOCK_ROWS):
        block = vectors[start : start + _BLOCK_ROWS].astype("float64")
        total, squares = total + block.sum(0), squares + np.square(block).sum(0)
    mean, std = mean_and_std(len(vectors), total, squares)
    return mean.astype("float32"), std.astype("float32")


def _clusters_in(folder: Path, option: str) -> Clusters:
    """Return the clusters of a store, of a run, or of an exported model."""
    for place in (folder, folder / PROCESSOR_FOLDER):
        if (place / PROCESSOR_FILE).is_file():
            folder, extractors = place, load_processor_description(place).extractors
            break
    else:
        if not (folder / STORE_FILE).is_file():
            raise UserError(f"{option} {folder}: neither a store nor a trained model is there: name one, or write {_METHOD}:K")
        extractors = load_description(folder).extractors
    clusters = load_clusters(folder, extractors)
    if clusters is None:
        raise UserError(f"{option} {folder}: its region labels are not by k-means: name another one, or write {_METHOD}:K")
    return clusters


def _log_use(path: Path, used: np.ndarray) -> None:
    _LOG.info(f"{path}: {used.sum()} image regions are labelled with {(used > 0).sum()} of {len(used)} clusters")


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
