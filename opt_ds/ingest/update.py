"""Replace one modality of a finished store with features of another extractor. Other modalities are kept.

The raw files are found through the manifest, by the ids of the samples.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from opt_ds.devices import choose_device
from opt_ds.errors import UserError
from opt_ds.features.extractors import difference
from opt_ds.features.further import FurtherExtractor
from opt_ds.ingest.file_features import Extracted, Failure
from opt_ds.ingest.manifest import Manifest, ManifestLine, read_manifest
from opt_ds.ingest.report import ModalityNotes, refresh_report
from opt_ds.ingest.settings import PrepareSettings
from opt_ds.ingest.workers import ShardFiles, extraction
from opt_ds.store.clusters import IMAGE_LABELS, Clusters, load_clusters, remove_other_clusters
from opt_ds.store.files import exclusive_use
from opt_ds.store.further import FurtherModality
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import BOX_SIZE, DATASETS, MISSING, MODALITIES, PIXELS_SHAPE, StoreDescription
from opt_ds.store.shards import join_columns
from opt_ds.store.update import Arrays, rewrite_shards
from opt_ds.store.verify import open_store
from opt_ds.store.writer import ImageItem

_LOG = logging.getLogger(__name__)


def update_modality(
    path: Path,
    manifest_path: Path,
    kind: str,
    settings: PrepareSettings,
    *,
    workers: int = 2,
    device: str = "auto",
    strict: bool = False,
    allow_outside: bool = False,
) -> StoreDescription:
    """Add or replace a modality of every sample whose manifest line names such a file.

    The store stays valid throughout. A sample whose file cannot be read, or whose line names none, loses this modality
    and is logged. New images remove the image codes, which `opt-ds train-dvae` makes again. Labels by k-means keep their
    clusters if the extractor stays the same; another one removes them.

    Args:
        path: The store's folder.
        manifest_path: The manifest.
        kind: "image", "audio" or a further modality, which `settings.extractors` has.
        settings: How features are extracted.
        workers: Number of worker processes.
        device: "auto", "cpu" or "cuda".
        strict: Stop at the first sample that would lose the modality.
        allow_outside: See `read_manifest`.

    Returns:
        The new description of the store.

    Raises:
        UserError: A sample is not in the manifest, or would be left without any modality.
    """
    with exclusive_use(path):
        store = open_store(path, with_dvae=False)
        files = _files_of_samples(store, manifest_path, kind, allow_outside)
        chosen_device = choose_device(device)
        choice = settings.extractor(kind).settled(manifest_path.parent / name for name in files if name is not None)
        extractor = choice.build(chosen_device)
        fingerprint, dims = choice.complete_fingerprint(extractor), _dims(store, extractor, kind, settings)
        if kind == "audio" and settings.trim_silence:
            fingerprint["trim_silence"] = True
        clusters = _kept_clusters(store, fingerprint) if kind == "image" else None
        if clusters is not None:
            dims = dims.model_copy(update={"image_num_classes": clusters.num_classes})
        further = {**store.description.further, kind: extractor.modality()} if isinstance(extractor, FurtherExtractor) else None
        del extractor
        shards = _shards(store, files, kind)
        notes = ModalityNotes(kind)
        splits = [store.description.split_names[code] for code in store.split_codes.tolist()]
        pixels: list[bool] = []
        total = sum(len(shard.files[kind]) for shard in shards)
        with (
            extraction(shards, manifest_path.parent, {kind: choice}, settings, workers, chosen_device) as results,
            tqdm(total=total, unit="file", desc=f"{kind} features", dynamic_ncols=True) as progress,
        ):

            def change(index: int, arrays: Arrays) -> Arrays:
                found = _take(results, shards[index].files[kind], progress)
                names = [files[sample] for sample in shards[index].lines]
                _note(notes, store, shards[index].lines, names, found, splits)
                if strict and notes.dropped:
                    raise UserError(
                        f'sample "{notes.dropped[0]["id"]}": {notes.dropped[0]["reason"]} (--strict stops at the first)'
                    )
                changed = _replace(arrays, store.description, kind, names, found, dims, further or {})
                if clusters is not None:
                    changed["image/labels"] = clusters.labels(changed["image/features"])
                refuse_empty(store, shards[index].lines, changed["samples/rows"])
                if len(changed["image/offsets"]) > 1:
                    pixels.append("image/pixels" in changed)
                return changed

            def fields() -> dict[str, Any]:
                new = {
                    "dims": dims,
                    "extractors": {**store.description.extractors, kind: fingerprint},
                    "preparation_key": "",
                }
                if kind == "image":
                    new["extractors"].pop("codes", None)
                    if clusters is None:
                        new["extractors"].pop(IMAGE_LABELS, None)
                    new |= {"has_codes": False, "has_pixels": bool(pixels) and all(pixels)}
                return new

            description = rewrite_shards(store, change, fields, new_further=further)
        refresh_report(path, description, notes)
        _LOG.info(
            f"{path}: {kind} features of {total} files by {fingerprint['name']}; {len(notes.dropped)} samples left "
            "without"
        )
        for line in notes.shown():
            _LOG.info(line)
        if kind == "image" and store.has_codes:
            _LOG.info("  the image codes were removed with the old images: write them again with opt-ds train-dvae")
        if IMAGE_LABELS in store.description.extractors:
            remove_other_clusters(path, description.extractors)
            if IMAGE_LABELS not in description.extractors:
                _LOG.info(
                    "  the labels by k-means were removed with the features of the former extractor: make them again with "
                    f"opt-ds update {path} --modality image_labels --extractor kmeans:K"
                )
        return description


def _kept_clusters(store: FeatureStore, fingerprint: Mapping[str, Any]) -> Clusters | None:
    """Return the clusters of the store's region labels if the new images have features of the same extractor."""
    extractors = store.description.extractors
    if IMAGE_LABELS not in extractors or difference(extractors.get("image", {}), fingerprint) is not None:
        return None
    return load_clusters(store.path, extractors)


def sample_lines(store: FeatureStore, manifest: Manifest) -> list[ManifestLine]:
    """Return the manifest line of each sample of the store.

    Raise UserError for a sample that is not in the manifest.
    """
    line_of = {line.id: line for line in manifest.lines}
    ids = [store.sample_id(index) for index in range(store.num_samples)]
    absent = [id for id in ids if id not in line_of]
    if absent:
        raise UserError(f'{manifest.path}: {len(absent)} samples of {store.path} are not in it, such as "{absent[0]}"')
    return [line_of[id] for id in ids]


def _files_of_samples(store: FeatureStore, manifest_path: Path, kind: str, allow_outside: bool) -> list[str | None]:
    further = [name for name in (*store.description.further, kind) if name not in MODALITIES]
    manifest = read_manifest(manifest_path, allow_outside=allow_outside, further=list(dict.fromkeys(further)))
    files = [line.file(kind) for line in sample_lines(store, manifest)]
    if not any(files):
        raise UserError(f'{manifest_path}: no line of the store\'s samples names an "{kind}" file')
    return files


def _dims(store: FeatureStore, extractor: Any, kind: str, settings: PrepareSettings) -> Any:
    if kind == "image":
        new = {"image_feature_dim": extractor.dim, "image_num_classes": extractor.num_classes, "num_codes": None}
    elif kind == "audio":
        rate = extractor.frame_rate_hz / settings.pool_frames
        new = {"audio_feature_dim": extractor.dim, "audio_frame_rate_hz": rate}
    else:
        new = {}
    return store.description.dims.model_copy(update=new)


def _shards(store: FeatureStore, files: list[str | None], kind: str) -> list[ShardFiles]:
    shards, start = [], 0
    for index, shard in enumerate(store.description.shards):
        samples = list(range(start, start + shard.num_samples))
        start += shard.num_samples
        names = list(dict.fromkeys(name for sample in samples if (name := files[sample]) is not None))
        shards.append(ShardFiles(index, samples, {kind: names}))
    return shards


def _take(results: Iterator[tuple[str, list[str], list[Any]]], names: list[str], progress: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while len(found) < len(names):
        _, chunk, values = next(results)
        found.update(zip(chunk, values, strict=True))
        progress.update(len(chunk))
    return found


def _note(
    notes: ModalityNotes,
    store: FeatureStore,
    samples: list[int],
    names: list[str | None],
    found: dict[str, Any],
    splits: list[str],
) -> None:
    seen: set[str] = set()
    for sample, name in zip(samples, names, strict=True):
        id = store.sample_id(sample)
        if name is None:
            modalities = store.description.modalities
            if notes.kind in modalities and store.rows[sample, modalities.index(notes.kind)] != MISSING:
                notes.dropped.append({"id": id, "reason": f"the manifest names no {notes.kind} file"})
            continue
        value = found[name]
        if isinstance(value, Failure):
            notes.dropped.append({"id": id, "reason": value.reason})
        elif name not in seen:
            notes.digests.append((value.digest, splits[sample], id))
            notes.truncated += [id] if value.was_truncated else []
        seen.add(name)


def _replace(
    arrays: Arrays,
    description: StoreDescription,
    kind: str,
    names: list[str | None],
    found: dict[str, Any],
    dims: Any,
    further: Mapping[str, FurtherModality],
) -> Arrays:
    """Return the arrays of a shard with new ones of a modality.

    Args:
        arrays: The arrays of the shard.
        description: The description of the store before the change.
        kind: The modality.
        names: The files of the shard's samples.
        found: File -> result.
        dims: The sizes after the change.
        further: The further modalities after the change.
    """
    row_of: dict[str, int] = {}
    items: list[Any] = []
    rows, modalities = arrays["samples/rows"].copy(), description.modalities
    if kind not in modalities:
        rows, modalities = np.pad(rows, ((0, 0), (0, 1)), constant_values=MISSING), (*modalities, kind)
    column = modalities.index(kind)
    for sample, name in enumerate(names):
        value = None if name is None else found[name]
        if name is None or not isinstance(value, Extracted):
            rows[sample, column] = MISSING
            continue
        if name not in row_of:
            row_of[name] = len(items)
            items.append(value.item)
        rows[sample, column] = row_of[name]
    kept = {key: array for key, array in arrays.items() if not key.startswith(f"{kind}/")}
    if kind in further:
        return {**kept, "samples/rows": rows, **join_columns(kind, further[kind], items)}
    new = _image_arrays(items, dims.image_feature_dim) if kind == "image" else _audio_arrays(items, dims.audio_feature_dim)
    return {**kept, "samples/rows": rows, **{key: array.astype(DATASETS[key], copy=False) for key, array in new.items()}}


def _audio_arrays(items: list[np.ndarray], dim: int) -> Arrays:
    return {"audio/offsets": _offsets(items), "audio/features": np.concatenate([np.zeros((0, dim), "float16"), *items])}


def _image_arrays(items: list[ImageItem], dim: int) -> Arrays:
    new = {
        "image/offsets": _offsets([item.features for item in items]),
        "image/features": np.concatenate([np.zeros((0, dim), "float16"), *(item.features for item in items)]),
        "image/boxes": np.concatenate([np.zeros((0, BOX_SIZE), "float32"), *(item.boxes for item in items)]),
        "image/labels": np.concatenate([np.zeros(0, "int16"), *(item.labels for item in items)]),
        "image/scores": np.concatenate([np.zeros(0, "float16"), *(item.scores for item in items)]),
    }
    pixels = [item.pixels for item in items if item.pixels is not None]
    if items and len(pixels) == len(items):
        new["image/pixels"] = np.stack(pixels).reshape(-1, *PIXELS_SHAPE)
    return new


def _offsets(items: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, items)], dtype="int64")


def refuse_empty(store: FeatureStore, samples: list[int], rows: np.ndarray) -> None:
    """Raise UserError if one of the samples would have no modality left. `rows`: their rows, int64 [n, M]."""
    empty = np.flatnonzero((rows == MISSING).all(1))
    if len(empty):
        id = store.sample_id(samples[int(empty[0])])
        raise UserError(f'{store.path}: sample "{id}" would have no modality left: fix its file, or prepare the store again')
