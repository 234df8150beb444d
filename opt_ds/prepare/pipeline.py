"""Manifest -> feature store: workers decode and extract, the main process tokenises and writes shard after shard.

The bytes written depend on the manifest, the extractors and the settings alone, never on the number of workers: work is
cut into fixed chunks, each chunk runs on one thread, and results are taken in order.
"""

import hashlib
import json
import multiprocessing
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from opt_ds import __version__
from opt_ds.errors import UserError
from opt_ds.prepare.extractors import choose_device
from opt_ds.prepare.finish import StoreFacts, finish_part, finish_store, is_finished_part, part_folder
from opt_ds.prepare.manifest import Manifest, groups_across_splits, read_manifest
from opt_ds.prepare.text import TextExtractor, copy_tokenizer, train_wordpiece
from opt_ds.store.files import exclusive_use
from opt_ds.store.schema import MISSING, STORE_FILE, Dims, StoreDescription, load_description
from opt_ds.store.writer import ImageItem, SampleItem, ShardContent, StoreWriter, TextItem

_CHUNK = {"image": 16, "audio": 32}
_AHEAD_PER_WORKER = 4


@dataclass(frozen=True)
class PrepareSettings:
    """How to make features. Paths are None where the extractor needs none; frames are pooled by mean, then cut."""

    images: str = "grid"
    image_weights: Path | None = None
    image_backbone: str | None = None
    speech: str = "logmel"
    speech_weights: Path | None = None
    text: Path | None = None
    vocab_size: int = 1200
    pixels: bool = True
    pool_frames: int = 1
    max_frames: int | None = None
    samples_per_shard: int = 1024
    compression: Literal["gzip"] | None = None


@dataclass(frozen=True)
class _Failure:
    reason: str


@dataclass
class _Shard:
    """A shard's line indices and the distinct files that they need, in order of first use."""

    index: int
    lines: list[int]
    files: dict[str, list[str]] = field(default_factory=dict)


def prepare(
    manifest_path: Path,
    output: Path,
    settings: PrepareSettings | None = None,
    *,
    workers: int = 2,
    device: str = "auto",
    strict: bool = False,
    limit: int | None = None,
    info: dict[str, Any] | None = None,
    share: tuple[int, int] | None = None,
    say: Callable[[str], None] = print,
) -> StoreDescription | None:
    """Make the feature store `output` from a manifest, resuming an unfinished one of the same inputs and settings.

    A sample with a broken or missing file is skipped and listed in the store's report.json; with `strict` it stops the
    run. `info` goes into store.json as it is. Returns the description; a finished store of the same inputs is returned
    as it is. Raises UserError for a bad manifest, setting, checkpoint or output before any feature is made.

    `share` (i, n): only the i-th of n parts (i from 0), into a folder of its own beside `output`; gives None. When all n are
    there, `merge_parts` makes the very store of them that one call without `share` makes.
    """
    settings = settings or PrepareSettings()
    _check_settings(settings, workers)
    folder = output if share is None else part_folder(output, *share)
    with exclusive_use(folder, say):
        return _prepare(manifest_path, folder, settings, workers, device, strict, limit, info, share, say)


def _prepare(
    manifest_path: Path,
    output: Path,
    settings: PrepareSettings,
    workers: int,
    device: str,
    strict: bool,
    limit: int | None,
    info: dict[str, Any] | None,
    share: tuple[int, int] | None,
    say: Callable[[str], None],
) -> StoreDescription | None:
    started = time.monotonic()
    manifest = read_manifest(manifest_path, limit=limit)
    chosen_device = choose_device(device)
    say(f"device: {chosen_device}; extractors: {settings.images}, {settings.speech}; workers: {workers}")
    extractors = {"image": _build("image", settings, chosen_device), "audio": _build("audio", settings, chosen_device)}
    identities = {name: extractor.identity() for name, extractor in extractors.items()}
    key = _preparation_key(manifest, settings, identities)
    if (output / STORE_FILE).exists():
        description = load_description(output)
        if description.preparation_key == key:
            say(f"{output}: already prepared from these inputs")
            return description
        raise UserError(f"{output}: another finished feature store is there: choose another --output or remove it")
    if share is not None and is_finished_part(output, key):
        say(f"{output}: this part is already prepared from these inputs")
        return None
    _check_files(manifest, strict)

    text_extractor = _tokenizer(manifest, settings, output)
    identities["text"] = text_extractor.identity()
    dims = Dims(
        image_feature_dim=extractors["image"].dim,
        image_num_classes=extractors["image"].num_classes,
        audio_feature_dim=extractors["audio"].dim,
        audio_frame_rate_hz=extractors["audio"].frame_rate_hz / settings.pool_frames,
        vocab_size=text_extractor.dim,
    )
    about = StoreFacts(
        dims=dims,
        split_names=manifest.split_names,
        splits_source=manifest.splits_source,
        extractors=identities,
        label_names=manifest.label_names,
        info={"created_by": f"opt_ds {__version__}", "manifest_sha256": manifest.sha256, **(info or {})},
        key=key,
        compression=settings.compression,
        num_shards=len(manifest.shards(settings.samples_per_shard)),
        num_lines=len(manifest.lines),
        groups_across_splits=groups_across_splits(manifest),
    )
    writer = about.writer(output, _staging(output))
    del extractors  # the workers build their own
    _extract_shards(manifest, settings, writer, text_extractor, workers, chosen_device, strict, share or (0, 1))
    seconds = round(time.monotonic() - started, 1)
    shutil.rmtree(_staging(output))
    if share is None:
        return finish_store(about, writer, output, seconds, say)
    finish_part(about, output, share, seconds)
    say(f"{output}: done; when all {share[1]} parts are: opt-ds merge")
    return None


def _check_settings(settings: PrepareSettings, workers: int) -> None:
    for name, value in (
        ("--workers", workers),
        ("--pool-frames", settings.pool_frames),
        ("--max-frames", 1 if settings.max_frames is None else settings.max_frames),
        ("--vocab-size", settings.vocab_size),
    ):
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")


def _build(modality: str, settings: PrepareSettings, device: str) -> Any:
    # Imported here, so that a process holds torchvision or torchaudio models only if it extracts.
    if modality == "image":
        from opt_ds.prepare.regions import build_region_extractor

        return build_region_extractor(
            settings.images, weights=settings.image_weights, backbone=settings.image_backbone, device=device
        )
    from opt_ds.prepare.speech import build_speech_extractor

    return build_speech_extractor(settings.speech, weights=settings.speech_weights, device=device)


def _preparation_key(manifest: Manifest, settings: PrepareSettings, identities: dict[str, Any]) -> str:
    text = None
    if settings.text is not None:
        if not settings.text.is_dir():
            raise UserError(f"--text {settings.text}: no such folder")
        file = next(
            (settings.text / name for name in ("tokenizer.json", "vocab.txt") if (settings.text / name).is_file()), None
        )
        text = hashlib.sha256(file.read_bytes()).hexdigest() if file else None
    fields = {name: str(value) for name, value in asdict(settings).items() if not name.endswith("_weights")}
    content = [manifest.sha256, {**fields, "text": text}, identities]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_files(manifest: Manifest, strict: bool) -> None:
    for kind in ("image", "audio"):
        names = {name for line in manifest.lines if (name := getattr(line, kind)) is not None}
        missing = sorted(name for name in names if not (manifest.folder / name).is_file())
        if missing and (strict or len(missing) == len(names)):
            raise UserError(
                f"{manifest.path}: {len(missing)} of {len(names)} {kind} files are missing, "
                f"the first is {manifest.folder / missing[0]}: paths are relative to the manifest"
            )


def _staging(output: Path) -> Path:
    return output.with_name(f".{output.name}.tokenizer")


def _tokenizer(manifest: Manifest, settings: PrepareSettings, output: Path) -> TextExtractor:
    """Copy or train the tokenizer beside the output (the writer then takes it in), and return its extractor."""
    folder = _staging(output)
    if settings.text is not None:
        copy_tokenizer(settings.text, folder)
    else:
        pairs = zip(manifest.lines, manifest.splits, strict=True)
        captions = [line.text for line, split in pairs if line.text is not None and split == "train"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        train_wordpiece(captions, settings.vocab_size, folder)
    return TextExtractor(folder)


def _extract_shards(
    manifest: Manifest,
    settings: PrepareSettings,
    writer: StoreWriter,
    text_extractor: TextExtractor,
    workers: int,
    device: str,
    strict: bool,
    share: tuple[int, int],
) -> None:
    own, of = share
    shards = [_Shard(index, lines) for index, lines in enumerate(manifest.shards(settings.samples_per_shard))]
    todo = [shard for shard in shards if shard.index % of == own and not writer.has_shard(shard.index)]
    for shard in todo:
        for kind in _CHUNK:
            names = (getattr(manifest.lines[line], kind) for line in shard.lines)
            shard.files[kind] = list(dict.fromkeys(name for name in names if name is not None))
    total = sum(len(files) for shard in todo for files in shard.files.values())
    with (
        _pool(settings, workers, device) as pool,
        tqdm(total=total, unit="file", desc="features", dynamic_ncols=True) as progress,
    ):
        results = _in_order(pool, _tasks(todo, manifest.folder, settings), workers * _AHEAD_PER_WORKER)
        for shard in todo:
            items: dict[str, dict[str, Any]] = {kind: {} for kind in _CHUNK}
            while sum(map(len, items.values())) < sum(map(len, shard.files.values())):
                kind, names, values = next(results)
                items[kind].update(zip(names, values, strict=True))
                progress.update(len(names))
            content, skipped = _assemble(manifest, shard.lines, items, text_extractor)
            if skipped and strict:
                pool.shutdown(wait=False, cancel_futures=True)
                raise UserError(f'sample "{skipped[0]["id"]}": {skipped[0]["reason"]} (--strict stops at the first)')
            writer.write_shard(shard.index, content, notes={"skipped": skipped})


def _pool(settings: PrepareSettings, workers: int, device: str) -> ProcessPoolExecutor:
    # Spawned, because a fork of a process with torch's thread pools or a CUDA context can hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(settings, device))


_worker: dict[str, Any] = {}


def _start_worker(settings: PrepareSettings, device: str) -> None:
    import torch

    torch.set_num_threads(1)
    _worker.update(settings=settings, device=device)


def _tasks(shards: Iterable[_Shard], folder: Path, settings: PrepareSettings) -> Iterator[tuple]:
    for shard in shards:
        for kind, size in _CHUNK.items():
            files = shard.files[kind]
            for start in range(0, len(files), size):
                yield kind, files[start : start + size], folder


def _in_order(pool: ProcessPoolExecutor, tasks: Iterator[tuple], ahead: int) -> Iterator[tuple]:
    """Yield the tasks' results in order, with at most `ahead` of them under way or waiting: memory stays bounded."""
    pending: deque[tuple[tuple, Future]] = deque()
    for task in tasks:
        pending.append((task, pool.submit(_extract_chunk, *task)))
        if len(pending) >= ahead:
            (kind, names, _), future = pending.popleft()
            yield kind, names, future.result()
    for (kind, names, _), future in pending:
        yield kind, names, future.result()


def _extract_chunk(kind: str, names: list[str], folder: Path) -> list[Any]:
    """In a worker: decode and extract files of one kind; a _Failure takes the place of what did not work."""
    if kind not in _worker:
        _worker[kind] = _build(kind, _worker["settings"], _worker["device"])
    decoded = [_decode(kind, folder / name) for name in names]
    good = [index for index, value in enumerate(decoded) if not isinstance(value, _Failure)]
    features = _worker[kind].extract([decoded[index] for index in good]) if good else []
    results: list[Any] = list(decoded)
    for index, feature in zip(good, features, strict=True):
        finish = _image_item if kind == "image" else _audio_item
        results[index] = finish(feature, decoded[index], _worker["settings"])
    return results


def _decode(kind: str, path: Path) -> Any:
    from opt_ds.prepare.pictures import load_picture
    from opt_ds.prepare.speech import load_recording

    if not path.is_file():
        return _Failure(f"{kind} file is missing: {path.name}")
    try:
        return load_picture(path) if kind == "image" else load_recording(path)
    except Exception as error:
        return _Failure(f"{kind} file is broken: {path.name}: {' '.join(str(error).split()) or type(error).__name__}")


def _image_item(feature: Any, picture: Any, settings: PrepareSettings) -> ImageItem | _Failure:
    from opt_ds.prepare.pictures import to_pixels

    if not len(feature.features):
        return _Failure("no region was found in the picture")
    if not np.isfinite(feature.features).all():
        return _Failure("region features are not finite")
    pixels = to_pixels(picture) if settings.pixels else None
    return ImageItem(feature.features, feature.boxes, feature.labels, feature.scores, pixels)


def _audio_item(frames: np.ndarray, _: Any, settings: PrepareSettings) -> np.ndarray | _Failure:
    if settings.pool_frames > 1:
        starts = np.arange(0, len(frames), settings.pool_frames)
        counts = np.diff(np.append(starts, len(frames)))[:, None]
        frames = (np.add.reduceat(frames.astype("float32"), starts) / counts).astype("float16")
    frames = frames[: settings.max_frames]
    return frames if np.isfinite(frames).all() else _Failure("speech features are not finite")


def _assemble(
    manifest: Manifest, lines: list[int], items: dict[str, dict[str, Any]], text_extractor: TextExtractor
) -> tuple[ShardContent, list[dict[str, str]]]:
    """Put a shard together; return it and what was skipped. Lines that name the same file share its row."""
    content, skipped = ShardContent(), []
    rows: dict[str, dict[str, int]] = {"image": {}, "audio": {}}
    targets: dict[str, list[Any]] = {"image": content.images, "audio": content.audios}
    for index in lines:
        line = manifest.lines[index]
        parts = {kind: items[kind][name] for kind in rows if (name := getattr(line, kind)) is not None}
        text = TextItem(text_extractor.extract([line.text])[0], line.text) if line.text is not None else None
        reason = next((part.reason for part in parts.values() if isinstance(part, _Failure)), None)
        if reason is None and text is not None and not len(text.tokens):
            reason = "the text has no tokens"
        if reason is not None:
            skipped.append({"id": line.id, "reason": reason})
            continue
        sample_rows = {"text": MISSING, "image": MISSING, "audio": MISSING}
        for kind, part in parts.items():
            row = rows[kind].setdefault(getattr(line, kind), len(targets[kind]))
            if row == len(targets[kind]):
                targets[kind].append(part)
            sample_rows[kind] = row
        if text is not None:
            sample_rows["text"] = len(content.texts)
            content.texts.append(text)
        own_rows = (sample_rows["text"], sample_rows["image"], sample_rows["audio"])
        content.samples.append(SampleItem(line.id, own_rows, line.group_name, manifest.splits[index], line.labels))
    return content, skipped
