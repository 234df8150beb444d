"""The processes that decode files and extract features (file_features.py), and the fixed chunks that they process.

Chunks depend on the manifest only, and each runs on one thread. An unreadable file leaves an empty position in its
chunk. The features of the other files are therefore the same bytes, whichever process computes them and whatever other
files are broken.
"""

import ctypes
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from opt_ds.decoding.limits import MIB
from opt_ds.decoding.tar_members import shown_name
from opt_ds.errors import RunError
from opt_ds.features.extractors import ExtractorChoice
from opt_ds.ingest.file_features import Extracted, Failure, FileFeatures
from opt_ds.ingest.retry import file_state
from opt_ds.ingest.settings import PrepareSettings
from opt_ds.interrupts import uninterrupted_children

_AHEAD_PER_WORKER = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_LARGEST_BYTES, _KEPT_BYTES = 32 * MIB, 256 * MIB  # the former is the maximum that glibc accepts


@dataclass
class ShardFiles:
    """The line indices of a shard, and the distinct files of each kind that they need, in order of first use."""

    index: int
    lines: list[int]
    files: dict[str, list[str]] = field(default_factory=dict)


@contextmanager
def extraction(
    shards: Iterable[ShardFiles],
    folder: Path,
    choices: Mapping[str, ExtractorChoice],
    settings: PrepareSettings,
    workers: int,
    device: str,
) -> Iterator[Iterator[tuple[str, list[str], list[Extracted | Failure]]]]:
    """Start the workers, and yield (kind, file names, results) chunk by chunk in the order of the shards.

    The workers are ended at the end, or earlier if the caller stops.

    Args:
        shards: The shards and their files.
        folder: The folder that file names are relative to.
        choices: Kind -> its extractor.
        settings: How files are decoded and what is kept of them.
        workers: Number of worker processes.
        device: Device of the extractors; "cuda" distributes the workers over all GPUs.
    """
    pool = _Pool(workers, choices, settings, device)
    sizes = {kind: choice.found.files_per_call for kind, choice in choices.items()}
    try:
        yield _in_order(pool, _tasks(shards, folder, sizes), workers * _AHEAD_PER_WORKER)
    except KeyboardInterrupt:  # the results of running tasks are not needed any more
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.close()


class _Pool:
    """The worker processes. If one is killed (for example out of memory), all are replaced and no chunk is lost."""

    def __init__(
        self, workers: int, choices: Mapping[str, ExtractorChoice], settings: PrepareSettings, device: str
    ) -> None:
        self._workers, self._how, self._device = workers, (choices, settings), device
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
            reason = f"no {task.kind} features could be made: {shown_name(name)}: it ends the worker process (out of memory?)"
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
            self._workers, mp_context=context, initializer=_start_worker, initargs=(*self._how, self._device, number)
        )


_features: FileFeatures | None = None  # of this process, if it is a worker


def _start_worker(choices: Mapping[str, ExtractorChoice], settings: PrepareSettings, device: str, number: Any) -> None:
    global _features
    import torch

    torch.set_num_threads(1)
    _keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with number.get_lock():
        own, number.value = number.value, number.value + 1
    if device == "cuda":  # workers are distributed over the GPUs in turn
        device = f"cuda:{own % torch.cuda.device_count()}"
    _features = FileFeatures(choices, settings, device)


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


def _tasks(shards: Iterable[ShardFiles], folder: Path, sizes: Mapping[str, int]) -> Iterator[_Task]:
    for shard in shards:
        for kind, size in sizes.items():
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
    assert _features is not None, "_start_worker runs first"
    return _features.chunk(kind, names, folder)
