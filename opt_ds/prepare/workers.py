"""The processes that decode files and extract features, and the fixed chunks of files that they are given.

A chunk is cut by the manifest alone and runs on one thread; a file that cannot be read leaves a hole in it, so that the
features of the others are the same bytes whoever computes them and whatever else is broken.
"""

import hashlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.interrupts import uninterrupted_children
from opt_ds.prepare.settings import PrepareSettings
from opt_ds.store.writer import ImageItem

_CHUNK = {"image": 16, "audio": 32}
_AHEAD_PER_WORKER = 4
_DIGEST_BYTES = 8  # identical files are counted, not proven


@dataclass(frozen=True)
class Failure:
    """What stands in the place of a file that could not be used."""

    reason: str


@dataclass(frozen=True)
class Extracted:
    """A file's features: an ImageItem, or frames [T, Da]; a hash of the file's bytes; whether frames were cut off."""

    item: Any
    digest: str
    was_cut: bool = False


@dataclass
class ShardFiles:
    """A shard's line indices, and the distinct files of each kind that they need, in order of first use."""

    index: int
    lines: list[int]
    files: dict[str, list[str]] = field(default_factory=dict)


def build_extractor(kind: str, settings: PrepareSettings, device: str) -> Any:
    """Build the extractor of "image" or "audio". UserError for bad settings or weights."""
    # Imported here, so that a process holds torchvision or torchaudio models only if it extracts.
    if kind == "image":
        from opt_ds.prepare.regions import build_region_extractor

        return build_region_extractor(
            settings.images,
            weights=settings.image_weights,
            backbone=settings.image_backbone,
            min_side=settings.image_min_side,
            max_side=settings.image_max_side,
            device=device,
        )
    from opt_ds.prepare.speech import build_speech_extractor

    return build_speech_extractor(
        settings.speech,
        weights=settings.speech_weights,
        layer=settings.speech_layer,
        window_s=settings.speech_window_s,
        overlap_s=settings.speech_overlap_s,
        device=device,
    )


@contextmanager
def extraction(
    shards: Iterable[ShardFiles], folder: Path, settings: PrepareSettings, workers: int, device: str
) -> Iterator[Iterator[tuple[str, list[str], list[Extracted | Failure]]]]:
    """Start the workers, and yield (kind, file names, results) chunk by chunk in the order of the shards.

    At the end, or when the caller is done early, the workers are ended.
    """
    # Spawned, because a fork of a process with torch's thread pools or a CUDA context can hang.
    context = multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(settings, device, number)
    )
    try:
        yield _in_order(pool, _tasks(shards, folder), workers * _AHEAD_PER_WORKER)
    except KeyboardInterrupt:  # nobody waits for what they are doing
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(settings: PrepareSettings, device: str, number: Any) -> None:
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with number.get_lock():
        own, number.value = number.value, number.value + 1
    if device == "cuda":  # the workers take turns over the GPUs
        device = f"cuda:{own % torch.cuda.device_count()}"
    _worker.update(settings=settings, device=device)


def _end_with_parent() -> None:
    # A killed main process cannot end its workers, which would wait for work, and hold their memory, for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tasks(shards: Iterable[ShardFiles], folder: Path) -> Iterator[tuple[str, list[str], Path]]:
    for shard in shards:
        for kind, size in _CHUNK.items():
            files = shard.files[kind]
            for start in range(0, len(files), size):
                yield kind, files[start : start + size], folder


def _in_order(
    pool: ProcessPoolExecutor, tasks: Iterator[tuple[str, list[str], Path]], ahead: int
) -> Iterator[tuple[str, list[str], list[Extracted | Failure]]]:
    """Yield the tasks' results in order, with at most `ahead` of them under way or waiting: memory stays bounded."""
    pending: deque[tuple[str, list[str], Future]] = deque()
    try:
        for kind, names, folder in tasks:
            with uninterrupted_children():  # submitting may start a worker
                pending.append((kind, names, pool.submit(_extract_chunk, kind, names, folder)))
            if len(pending) >= ahead:
                kind, names, future = pending[0]
                yield kind, names, future.result()
                pending.popleft()
        while pending:
            kind, names, future = pending[0]
            yield kind, names, future.result()
            pending.popleft()
    except BrokenProcessPool:
        near = f", perhaps by one of {pending[0][1][0]} to {pending[-1][1][-1]}" if pending else ""
        raise UserError(
            f"a worker process was ended from outside (out of memory?){near}: "
            "run the same command again with fewer --workers, it resumes"
        ) from None


def _extract_chunk(kind: str, names: list[str], folder: Path) -> list[Extracted | Failure]:
    """In a worker: decode and extract files of one kind."""
    settings = _worker["settings"]
    if kind not in _worker:
        _worker[kind] = build_extractor(kind, settings, _worker["device"])
    decoded = [_decode(kind, folder / name, settings) for name in names]
    inputs = [None if isinstance(value, Failure) else value for value in decoded]
    features = _extract(kind, inputs)
    finish = _image_item if kind == "image" else _audio_item
    results: list[Extracted | Failure] = []
    for name, value, feature in zip(names, decoded, features, strict=True):
        failure = next((each for each in (value, feature) if isinstance(each, Failure)), None)
        results.append(failure or finish(feature, value, settings, _digest(folder / name)))
    return results


def _extract(kind: str, inputs: Sequence[Any]) -> list[Any]:
    """Extract a chunk; if it fails as a whole, file by file, so that one odd file costs itself alone."""
    extractor = _worker[kind]
    try:
        return extractor.extract(inputs)
    except Exception:
        return [_extract_alone(kind, extractor, value) for value in inputs]


def _extract_alone(kind: str, extractor: Any, value: Any) -> Any:
    try:
        return extractor.extract([value])[0]
    except Exception as error:
        return Failure(f"no {kind} features could be made: {_one_line(error)}")


def _decode(kind: str, path: Path, settings: PrepareSettings) -> Any:
    from opt_ds.prepare.pictures import load_picture
    from opt_ds.prepare.recordings import load_recording, trim_silence

    try:
        if not path.is_file():
            return Failure(f"{kind} file is missing: {path.name}")
        if kind == "image" and getattr(_worker[kind], "reads_files", False):
            return path
        if kind == "image":
            return load_picture(path, settings.max_pixels)
        recording = load_recording(path, settings.max_seconds)
        return trim_silence(recording) if settings.trim_silence else recording
    except Exception as error:  # decoders raise anything at all
        # The report must not depend on where the files lie.
        return Failure(f"{kind} file is broken: {path.name}: {_one_line(error).replace(str(path), path.name)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=_DIGEST_BYTES).hexdigest()


def _image_item(feature: Any, picture: Any, settings: PrepareSettings, digest: str) -> Extracted | Failure:
    from opt_ds.prepare.pictures import to_pixels

    if not len(feature.features):
        return Failure("no region was found in the picture")
    if not np.isfinite(feature.features).all():
        return Failure("region features are not finite")
    if not (np.isfinite(feature.boxes).all() and np.isfinite(feature.scores).all()):
        return Failure("region boxes or scores are not finite")
    pixels = to_pixels(picture) if settings.pixels and not isinstance(picture, Path) else None
    item = ImageItem(feature.features, feature.boxes, feature.labels, feature.scores, pixels)
    return Extracted(item, digest)


def _audio_item(frames: np.ndarray, _: Any, settings: PrepareSettings, digest: str) -> Extracted | Failure:
    from opt_ds.prepare.speech import pool_frames

    frames = pool_frames(frames, settings.pool_frames)
    kept = frames[: settings.max_frames]
    if not np.isfinite(kept).all():
        return Failure("speech features are not finite")
    return Extracted(kept, digest, was_cut=len(kept) < len(frames))
