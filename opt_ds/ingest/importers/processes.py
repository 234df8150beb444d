"""Run a function over many small tasks in worker processes, in order and with a progress bar."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from opt_ds.errors import RunError
from opt_ds.interrupts import uninterrupted_children

Task = TypeVar("Task")
Result = TypeVar("Result")

_CHUNK = 64  # tasks that a process takes at a time
_FEW = 256  # tasks that take less time than starting a process


def in_processes(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, name: str) -> list[Result]:
    """Return the results of all tasks, in their order.

    Args:
        function: A function of a module, which the processes import.
        tasks: Its arguments.
        workers: Number of processes. Few tasks run in this one.
        name: Label of the progress bar.

    Raises:
        RunError: A process was killed.
    """
    with tqdm(total=len(tasks), desc=name, dynamic_ncols=True) as progress:
        results: list[Result] = []
        if workers == 1 or len(tasks) <= _FEW:
            for task in tasks:
                results.append(function(task))
                progress.update()
            return results
        chunks = [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            with uninterrupted_children():
                futures = [pool.submit(_run, function, chunk) for chunk in chunks]
            for future in futures:
                results += future.result()
                progress.update(len(results) - progress.n)
        except BrokenProcessPool:
            raise RunError("a worker process was killed: run the same command again to resume") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return results


def _run(function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    return [function(task) for task in tasks]
