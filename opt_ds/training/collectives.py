"""Watchdog for collective calls: ranks that make different calls fail with a message instead of waiting forever.

Every rank records its calls per process group. A rank that has made no call for `still_s` seconds publishes its record
in the rendezvous store and reads the records of the others. Recorded calls do not change. Two different calls at the
same position in the records of two ranks therefore prove a mismatch, however long a legitimate call may take.

Measured with gloo: without this watchdog, ranks wait until `guard.rank_timeout_s` after a skipped gather, unless a
later message is longer than the other rank expects. In that case gloo aborts the process itself and the other ranks
lose contact with it.
"""

import json
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.distributed import distributed_c10d

_KEPT = 16384  # calls remembered per group; stage 3 makes some thousands per step
#: Prefixes of the names of a process group's collective methods. The full names differ between versions of torch.
_METHODS = ("all", "_allgather", "reduce", "_reduce_scatter", "broadcast", "gather", "scatter", "barrier")

Call = tuple[str, int, str]  # method, elements, dtype


class CollectiveNotes:
    """Record of this process's collective calls per group: the number of calls, and the last calls themselves."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.calls: dict[str, deque[Call]] = {}
        self.total = 0

    def add(self, group: str, call: Call) -> None:
        """Record a call that is about to be made."""
        self.calls.setdefault(group, deque(maxlen=_KEPT)).append(call)
        self.counts[group] = self.counts.get(group, 0) + 1
        self.total += 1

    def pack(self) -> bytes:
        """Return the record in the compressed form that is published in the store."""
        plain = {group: [self.counts[group], list(calls)] for group, calls in self.calls.items()}
        return zlib.compress(json.dumps(plain).encode())


def first_difference(notes: dict[int, bytes]) -> str | None:
    """Return a description of the first position at which two ranks made different calls.

    Return None if their common positions agree.
    """
    unpacked = {rank: json.loads(zlib.decompress(packed)) for rank, packed in notes.items()}
    first, *others = sorted(unpacked)
    for other in others:
        for group in unpacked[first].keys() & unpacked[other].keys():
            (ours, our_calls), (theirs, their_calls) = unpacked[first][group], unpacked[other][group]
            for place in range(max(ours - len(our_calls), theirs - len(their_calls)), min(ours, theirs)):
                our, their = our_calls[place - ours], their_calls[place - theirs]
                if our != their:
                    return f"in call {place + 1} rank {first} is at {_words(our)}, rank {other} at {_words(their)}"
    return None


def _words(call: list[Any]) -> str:
    method, numel, dtype = call
    name = method.strip("_").removesuffix("_base")
    return f"{name} of {numel} {dtype}" if numel else name


class CollectiveWatch:
    """The record of this process's calls, and the thread that compares it with the records of other ranks."""

    def __init__(self, rank: int, world_size: int, still_s: float, fail: Callable[[str], None]) -> None:
        """Start watching.

        Args:
            rank: This process's rank.
            world_size: Number of ranks.
            still_s: Seconds without a call after which records are compared.
            fail: Called from the watching thread with the description of a mismatch.
        """
        self.notes = CollectiveNotes()
        self._rank, self._world_size, self._still_s, self._fail = rank, world_size, still_s, fail
        self._ended = threading.Event()
        self._undo = _note_calls(self.notes)
        self._thread = threading.Thread(target=self._watch, name="collectives", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        self._thread.join()
        self._undo()

    def _watch(self) -> None:
        store, period = None, self._still_s / 4
        seen, still = -1, 0.0
        while not self._ended.wait(period):
            still = still + period if self.notes.total == seen else 0.0
            seen = self.notes.total
            if still < self._still_s:
                continue
            try:
                store = store or _own_store()
                store.set(_key(self._rank), self.notes.pack())
                there = [rank for rank in range(self._world_size) if store.check([_key(rank)])]
                difference = first_difference({rank: store.get(_key(rank)) for rank in there})
            except RuntimeError:  # The store ended with rank 0, or the record grew while it was packed.
                store = None
                continue
            if difference:
                if self._rank == 0:
                    self._ended.wait(2 * period)  # rank 0 hosts the store, which the other ranks must read first
                self._fail(difference)
                return


def end_process(rank: int) -> Callable[[str], None]:
    """Return a `fail` callback that ends this process with code 1.

    It does not raise, because the main thread waits in a call that never returns.
    """

    def fail(difference: str) -> None:
        text = (
            f"error: rank {rank}: the ranks' collective calls do not match: {difference}: this is a fault of the program, not of "
            "your settings; start again with the same --output and zero.stage=1, and report these lines\n"
        )
        os.write(2, text.encode())
        os._exit(1)

    return fail


def _key(rank: int) -> str:
    return f"opt_ds/collectives/{rank}"


def _own_store() -> Any:
    """Return a connection for this thread alone. The main thread may hold its connection's lock while it waits."""
    port = int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, wait_for_workers=False)


def _note_calls(notes: CollectiveNotes) -> Callable[[], None]:
    """Record every collective call of every group from now on. Return a function that undoes this."""
    cls = distributed_c10d.ProcessGroup
    originals = {name: getattr(cls, name) for name in dir(cls) if name.startswith(_METHODS)}
    for name, original in originals.items():

        def noted(group: Any, *arguments: Any, _name: str = name, _original: Any = original, **options: Any) -> Any:
            notes.add(group.group_name, (_name, *_size(arguments)))
            return _original(group, *arguments, **options)

        setattr(cls, name, noted)

    def undo() -> None:
        for name, original in originals.items():
            setattr(cls, name, original)

    return undo


def _size(arguments: tuple[Any, ...]) -> tuple[int, str]:
    """Return the number of elements and the dtype of a call's first argument.

    The argument is a tensor or nested lists of tensors.
    """
    first = arguments[0] if arguments else None
    numel, dtype = 0, ""
    waiting = [first]
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            numel, dtype = numel + item.numel(), str(item.dtype).removeprefix("torch.")
        elif isinstance(item, (list, tuple)):
            waiting += item
    return numel, dtype
