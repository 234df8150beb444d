"""A watch over the ranks' collective calls: ranks that call different ones end with a message instead of waiting for ever.

Every rank notes its calls, group by group. A rank that has made none for `still_s` seconds publishes its notes in the store
through which the ranks joined, and reads those of the others. Calls that were made do not change, so two different calls in
the same place of two ranks' notes prove a mismatch, however long a legitimate call may take.

Tried with gloo: without this, ranks wait until `guard.rank_timeout_s` after a skipped gather, unless a later message is
longer than what the other rank expects. Then gloo aborts that process itself, and the others lose contact with it.
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

_KEPT = 16384  # calls of a group that a rank remembers; stage 3 makes some thousands in a step
#: How the names of a group's collective methods begin; torch's versions differ in the names themselves.
_METHODS = ("all", "_allgather", "reduce", "_reduce_scatter", "broadcast", "gather", "scatter", "barrier")

Call = tuple[str, int, str]  # method, elements, dtype


class CollectiveNotes:
    """What this process has called, by group: how often in all, and the last calls."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.calls: dict[str, deque[Call]] = {}
        self.total = 0

    def add(self, group: str, call: Call) -> None:
        """Note a call that is about to be made."""
        self.calls.setdefault(group, deque(maxlen=_KEPT)).append(call)
        self.counts[group] = self.counts.get(group, 0) + 1
        self.total += 1

    def pack(self) -> bytes:
        """For the store."""
        plain = {group: [self.counts[group], list(calls)] for group, calls in self.calls.items()}
        return zlib.compress(json.dumps(plain).encode())


def first_difference(notes: dict[int, bytes]) -> str | None:
    """The first place in which two ranks called different collectives, in words; None if their common places are equal."""
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
    """The notes of this process, and the thread that compares them."""

    def __init__(self, rank: int, world_size: int, still_s: float, fail: Callable[[str], None]) -> None:
        """Begin to watch. `fail`: called, in a thread, with the words of a mismatch."""
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
            except RuntimeError:  # the store ended with rank 0; or notes that grew while they were packed
                store = None
                continue
            if difference:
                if self._rank == 0:
                    self._ended.wait(2 * period)  # it has the store, which the others must read first
                self._fail(difference)
                return


def end_process(rank: int) -> Callable[[str], None]:
    """A `fail` that ends this process with code 1: its main thread waits in a call that never returns."""

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
    """A connection of the thread's own: the main thread may hold the lock of its one while it waits."""
    port = int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, wait_for_workers=False)


def _note_calls(notes: CollectiveNotes) -> Callable[[], None]:
    """Note every collective of every group from now on; gives the way back."""
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
    """Elements and dtype of a call's first argument: a tensor, or lists of tensors."""
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
