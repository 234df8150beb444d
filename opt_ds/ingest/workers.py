"""The processes that decode files and extract features, and the fixed chunks of files that they process.

Chunks depend on the manifest only, and each runs on one thread. An unreadable file leaves an empty position in its
chunk. The features of the other files are therefore the same bytes, whichever process computes them and whatever other
files are broken.
"""

import ctypes
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.decoding.decoder import Decoded, DecodingError, EnvironmentFaultError, MissingFileError, own_decoder
from opt_ds.decoding.limits import MIB
from opt_ds.errors import RunError
from opt_ds.ingest.retry import file_state
from opt_ds.ingest.settings import PrepareSettings
from opt_ds.interrupts import uninterrupted_children
from opt_ds.store.checks import audio_problem, image_problem
from opt_ds.store.writer import ImageItem

_CHUNK = {"image": 16, "audio": 32}
_AHEAD_PER_WORKER = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_LARGEST_BYTES, _KEPT_BYTES = 32 * MIB, 256 * MIB  # the former is the maximum that glibc accepts


@dataclass(frozen=True)
class Failure:
    """The result for a file that could not be used. `state` is the state of the file (see retry.py)."""

    reason: str
    state: Any = None


@dataclass(frozen=True)
class Extracted:
    """The result for a file: an ImageItem or frames [T, Da], a hash of the bytes, and whether frames were truncated."""

    item: Any
    digest: str
    was_cut: bool = False


@dataclass
class ShardFiles:
    """The line indices of a shard, and the distinct files of each kind that they need, in order of first use."""

    index: int
    lines: list[int]
    files: dict[str, list[str]] = field(default_factory=dict)


def build_extractor(kind: str, settings: PrepareSettings, device: str) -> Any:
    """Build the extractor of "image" or "audio". Raise UserError for invalid settings or weights."""
    # Imported here, so that only processes that extract load torchvision or torchaudio.
    if kind == "image":
        from opt_ds.features.region_extractors import build_region_extractor

        return build_region_extractor(
            settings.images,
            weights=settings.image_weights,
            backbone=settings.image_backbone,
            min_side=settings.image_min_side,
            max_side=settings.image_max_side,
            device=device,
        )
    from opt_ds.features.speech import build_speech_extractor

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

    The workers are ended at the end, or earlier if the caller stops.

    Args:
        shards: The shards and their files.
        folder: The folder that file names are relative to.
        settings: How features are extracted.
        workers: Number of worker processes.
        device: Device of the extractors; "cuda" distributes the workers over all GPUs.
    """
    pool = _Pool(workers, settings, device)
    try:
        yield _in_order(pool, _tasks(shards, folder), workers * _AHEAD_PER_WORKER)
    except KeyboardInterrupt:  # the results of running tasks are not needed any more
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.close()


class _Pool:
    """The worker processes. If one is killed (for example out of memory), all are replaced and no chunk is lost."""

    def __init__(self, workers: int, settings: PrepareSettings, device: str) -> None:
        self._workers, self._settings, self._device = workers, settings, device
        self._start()

    def submit(self, task: "_Task") -> Future:
        """Submit a chunk. If the pool is broken, return a future with that exception."""
        try:
            with uninterrupted_children():  # submitting may start a worker
                return self._pool.submit(_extract_chunk, task.kind, task.names, task.folder)
        except BrokenProcessPool as error:  # a worker has ended since: report it as the result of the task
            failed: Future = Future()
            failed.set_exception(error)
            return failed

    def close(self) -> None:
        """End the workers and drop waiting chunks."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def extract_alone(self, task: "_Task") -> list[Extracted | Failure]:
        """Extract a chunk after the end of a worker, with no other chunk running.

        If it ends the worker again, go file by file.
        """
        results = self._attempt(task)
        if results is not None:
            return results
        if self._attempt(replace(task, names=[None] * len(task.names))) is None:
            raise RunError(
                "worker processes are ended from outside before they read a file (out of memory?): what is done is kept; free "
                "memory, or use fewer --workers, and run the same command again, it resumes"
            )
        return [self._extract_file(task, place) for place in range(len(task.names))]

    def _extract_file(self, task: "_Task", place: int) -> Extracted | Failure:
        # The positions of the other files stay empty, since features depend on the position of a file in its chunk.
        name = task.names[place]
        assert name is not None
        results = self._attempt(replace(task, names=[name if index == place else None for index in range(len(task.names))]))
        if results is None:
            reason = f"no {task.kind} features could be made: {Path(name).name}: it ends the worker process (out of memory?)"
            return Failure(reason, file_state(task.folder / name))
        return results[place]

    def _attempt(self, task: "_Task") -> list[Extracted | Failure] | None:
        try:
            return self.submit(task).result()
        except BrokenProcessPool:
            self.close()
            self._start()
            return None

    def restart(self) -> None:
        """Replace all workers."""
        self.close()
        self._start()

    def _start(self) -> None:
        # Workers are spawned, because forking a process with torch's thread pools or a CUDA context can hang.
        context = multiprocessing.get_context("spawn")
        with uninterrupted_children():  # the first shared value starts a resource tracker process
            number = context.Value("i", 0)
        self._pool = ProcessPoolExecutor(
            self._workers, mp_context=context, initializer=_start_worker, initargs=(self._settings, self._device, number)
        )


_worker: dict[str, Any] = {}


def _start_worker(settings: PrepareSettings, device: str, number: Any) -> None:
    import torch

    torch.set_num_threads(1)
    _keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with number.get_lock():
        own, number.value = number.value, number.value + 1
    if device == "cuda":  # workers are distributed over the GPUs in turn
        device = f"cuda:{own % torch.cuda.device_count()}"
    _worker.update(settings=settings, device=device)


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks for the next file, instead of unmapping and mapping them page by page.

    Otherwise a fifth of a worker's CPU time is spent on such pages. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _end_with_parent() -> None:
    # A killed main process cannot end its workers, which would wait for work and hold their memory forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclass(frozen=True)
class _Task:
    """A chunk of files of one kind. None in `names` is the position of a file that is not extracted this time."""

    kind: str
    names: list[Any]
    folder: Path


def _tasks(shards: Iterable[ShardFiles], folder: Path) -> Iterator[_Task]:
    for shard in shards:
        for kind, size in _CHUNK.items():
            files = shard.files[kind]
            for start in range(0, len(files), size):
                yield _Task(kind, files[start : start + size], folder)


def _in_order(
    pool: _Pool, tasks: Iterator[_Task], ahead: int
) -> Iterator[tuple[str, list[str], list[Extracted | Failure]]]:
    """Yield the results of the tasks in order.

    At most `ahead` tasks are running or waiting, so that memory stays bounded.
    """
    pending: deque[tuple[_Task, Future]] = deque()
    while True:
        for task in islice(tasks, ahead - len(pending)):
            pending.append((task, pool.submit(task)))
        if not pending:
            return
        task, future = pending[0]
        try:
            results = future.result()
        except BrokenProcessPool:
            pool.restart()
            results = pool.extract_alone(task)
            # Running tasks ended with the pool. Results of completed tasks are kept.
            later = [(other, _again(pool, other, done)) for other, done in list(pending)[1:]]
            pending = deque([pending[0], *later])
        yield task.kind, task.names, results
        pending.popleft()


def _again(pool: _Pool, task: _Task, future: Future) -> Future:
    is_done = future.done() and not future.cancelled() and future.exception() is None
    return future if is_done else pool.submit(task)


def _extract_chunk(kind: str, names: list[str | None], folder: Path) -> list[Extracted | Failure]:
    """Decode and extract files of one kind, inside a worker. A position without a name stays empty."""
    settings = _worker["settings"]
    if kind not in _worker:
        _worker[kind] = build_extractor(kind, settings, _worker["device"])
    decoded = [Failure("") if name is None else _decode(kind, folder / name, settings) for name in names]
    inputs = [value.content if isinstance(value, Decoded) else None for value in decoded]
    features = _extract(kind, inputs)
    finish = _image_item if kind == "image" else _audio_item
    results: list[Extracted | Failure] = []
    for name, value, feature in zip(names, decoded, features, strict=True):
        if isinstance(value, Failure):
            result: Extracted | Failure = value
        else:
            result = feature if isinstance(feature, Failure) else finish(feature, value, settings)
        if isinstance(result, Failure) and name is not None:
            result = replace(result, state=file_state(folder / name))
        results.append(result)
    return results


def _extract(kind: str, inputs: Sequence[Any]) -> list[Any]:
    """Extract a chunk. If that fails, extract file by file, so that one unusual file affects itself only.

    The other positions stay empty then, since features depend on the position of a file in its chunk.
    """
    extractor = _worker[kind]
    try:
        return extractor.extract(inputs)
    except EnvironmentFaultError:
        raise
    except Exception:
        return [_extract_alone(kind, extractor, inputs, place) for place in range(len(inputs))]


def _extract_alone(kind: str, extractor: Any, inputs: Sequence[Any], place: int) -> Any:
    value = inputs[place]
    if value is None:
        return None
    try:
        return extractor.extract([value if other == place else None for other in range(len(inputs))])[place]
    except EnvironmentFaultError:
        raise
    except DecodingError as error:
        return _failure(kind, value, error)
    except Exception as error:
        return Failure(f"no {kind} features could be made: {_one_line(error)}")


def _decode(kind: str, path: Path, settings: PrepareSettings) -> Decoded[Any] | Failure:
    """Decode a file. Raise EnvironmentFaultError, which ends the run, for faults unrelated to its content."""
    from opt_ds.decoding.recordings import trim_silence

    decoder, limits = own_decoder(), settings.decoding_limits()
    try:
        if kind == "image" and getattr(_worker[kind], "reads_files", False):
            return Decoded(path, decoder.digest(path, "arrays"))
        if kind == "image":
            return decoder.picture(path, limits)
        recording = decoder.recording(path, limits)
        return replace(recording, content=trim_silence(recording.content)) if settings.trim_silence else recording
    except DecodingError as error:
        return _failure(kind, path, error)
    except EnvironmentFaultError:
        raise
    except MemoryError:
        raise EnvironmentFaultError(f"{path}: its content does not fit into memory: use fewer --workers") from None
    except Exception as error:
        return Failure(f"{kind} file is broken: {path.name}: {_one_line(error)}")


def _failure(kind: str, path: Path, error: DecodingError) -> Failure:
    # The report must not depend on the folder of the files.
    if isinstance(error, MissingFileError):
        return Failure(f"{kind} file is missing: {path.name}")
    return Failure(f"{kind} file is {'refused' if error.refused else 'broken'}: {path.name}: {error}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _image_item(feature: Any, decoded: Decoded[Any], settings: PrepareSettings) -> Extracted | Failure:
    from opt_ds.decoding.pictures import to_pixels

    if not len(feature.features):
        return Failure("no region was found in the picture")
    if (problem := image_problem(feature, _worker["image"].dim, _worker["image"].num_classes)) is not None:
        return Failure(f"regions cannot be stored: {problem}")
    picture = decoded.content
    pixels = to_pixels(picture) if settings.pixels and not isinstance(picture, Path) else None
    item = ImageItem(feature.features, feature.boxes, feature.labels, feature.scores, pixels)
    return Extracted(item, decoded.digest)


def _audio_item(frames: np.ndarray, decoded: Decoded[Any], settings: PrepareSettings) -> Extracted | Failure:
    from opt_ds.features.speech import pool_frames

    frames = pool_frames(frames, settings.pool_frames)
    kept = frames[: settings.max_frames]
    if (problem := audio_problem(kept, _worker["audio"].dim)) is not None:
        return Failure(f"speech cannot be stored: {problem}")
    return Extracted(kept, decoded.digest, was_cut=len(kept) < len(frames))
