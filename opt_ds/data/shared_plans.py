"""Step plans shared by the ranks of one node.

Of n ranks, each plans every n-th step and writes it to a file for the others.

A plan is a function of (config, stores, step), so sharing is only a cache. A rank plans a step itself if it does not
find the file in time, or if the file is damaged or belongs to another run. A file holds a complete `StepPlan` that
the others map. Its pages are in memory once, whatever the number of ranks and however many steps they are ahead.

Each rank has an inbox, a folder of files named by their steps. The rank that plans a step links one file into the
inboxes of all others. A reader removes its link when it maps the file, so nothing remains once all have read it.
"""

import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.data.micro_batches import MicroBatches
from opt_ds.data.step_plan import Plan, StepPlan
from opt_ds.data.step_samples import StepSamples
from opt_ds.log import EVERY_RANK
from opt_ds.version import __version__

_LOG = logging.getLogger(__name__)
# Patience for another rank's plan: minimum in seconds, and multiple of the longest planning time here.
_WAIT_S, _WAIT_PLANS = 5.0, 4.0
_POLL_S = 0.002
_MOST_WAITING = 64  # maximum number of files in an inbox
_SHARED_FROM = 2048  # samples per step; planning a smaller step takes about as long as reading a file
_ALIGNMENT = 64  # bytes
_MICRO_BATCHES = ("indices", "sizes", "num_tokens", "costs")
_NUMBERS = (
    "step", "counts", "divisors", "num_tokens", "packing_efficiency", "load_imbalance", "flops", "first_pass", "num_copies",
)  # fmt: skip


def is_worth_sharing(plan: Plan) -> bool:
    """Return whether reading a step's plan is faster than computing it."""
    return plan.batch_samples >= _SHARED_FROM


class SharedPlans:
    """Step plan of a run, shared by the `count` ranks of this node.

    Rank `place` plans the steps with this remainder.
    """

    def __init__(self, plan: Plan, world_size: int, folder: Path, place: int, count: int) -> None:
        """Share plans through `folder`.

        Args:
            plan: The step plan.
            world_size: Number of ranks of the run.
            folder: Folder of this launch and node only, for which `make_inboxes` was called.
            place: Number of this rank on its node.
            count: Number of ranks of the node.
        """
        self._plan, self._world_size, self._folder = plan, world_size, folder
        self._place, self._count = place, count
        self._key = _key_of(plan, world_size)
        self._longest_s = 0.0  # longest time that planning a step took here
        self._late: set[int] = set()  # ranks that are not waited for until their plans appear again
        self.num_read = self.num_missed = 0

    def steps(self, first: int, last: int) -> Iterator[StepPlan]:
        """Yield the plans of steps first … last − 1.

        The next own step is planned and shared before this rank waits for another rank's plan.
        """
        own: StepPlan | None = None
        for step in range(first, last):
            following = step + (self._place - step) % self._count
            if following < last and (own is None or own.step < following):
                own = self._own_plan(following)
                self._leave(own)
            if own is not None and own.step == step:
                yield own
            else:
                yield self._read(step) or self._own_plan(step)

    def _own_plan(self, step: int) -> StepPlan:
        began = time.perf_counter()
        step_plan = self._plan.step(step, self._world_size)
        self._longest_s = max(self._longest_s, time.perf_counter() - began)
        return step_plan

    # ---- writing and reading

    def _leave(self, step_plan: StepPlan) -> None:
        """Link the plan's file into the other ranks' inboxes that have room.

        If the disk is full, the others plan the step themselves.
        """
        temporary = self._folder / f".{step_plan.step}-{self._place}.tmp"
        try:
            write_plan(temporary, step_plan, self._key)
            for other in range(self._count):
                inbox = _inbox(self._folder, other)
                if other != self._place and len(os.listdir(inbox)) < _MOST_WAITING:
                    os.link(temporary, inbox / str(step_plan.step))
        except OSError as error:
            self._note(step_plan.step, f"{self._folder} cannot take it ({error.strerror})")
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self, step: int) -> StepPlan | None:
        """Return another rank's plan of a step, or None if it is not there in time or belongs to another run."""
        owner, inbox = step % self._count, _inbox(self._folder, self._place)
        _remove_before(inbox, step)
        patience = 0.0 if owner in self._late else max(_WAIT_S, _WAIT_PLANS * self._longest_s)
        until = time.monotonic() + patience
        path = inbox / str(step)
        while not path.exists():
            if time.monotonic() >= until or not inbox.is_dir():  # the folder is removed when the run ends
                self._late.add(owner)
                self._note(step, f"rank {owner} of this node has not written it within {patience:.0f} s")
                return None
            time.sleep(_POLL_S)
        self._late.discard(owner)
        step_plan = read_plan(path, step, self._key)
        path.unlink(missing_ok=True)
        if step_plan is None:
            self._note(step, "its file is damaged, or another run's")
        else:
            self.num_read += 1
        return step_plan

    def _note(self, step: int, reason: str) -> None:
        self.num_missed += 1
        if self.num_missed == 1:
            _LOG.warning(
                f"step {step}: its plan is not shared between the ranks of this node; each computes it, which takes longer but "
                f"changes no result: {reason} (further cases are not logged)",
                extra=EVERY_RANK,
            )


def make_inboxes(folder: Path, count: int) -> None:
    """Create the inboxes of the node's `count` ranks."""
    for place in range(count):
        _inbox(folder, place).mkdir()


def _inbox(folder: Path, place: int) -> Path:
    return folder / f"rank-{place}"


def _remove_before(inbox: Path, step: int) -> None:
    """Remove plans that arrived too late."""
    try:
        for name in os.listdir(inbox):
            if int(name) < step:
                (inbox / name).unlink(missing_ok=True)
    except (OSError, ValueError):  # the folder is gone because the node's first rank has ended
        pass


def _key_of(plan: Plan, world_size: int) -> str:
    """Return a hash of everything that the plan of a step depends on."""
    stores = [store.fingerprint for store in plan.stores]
    about = [__version__, type(plan).__name__, plan.version, plan.config.model_dump(mode="json"), stores, world_size]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


# ---- file format: one line of JSON that describes the content, then the arrays


def write_plan(path: Path, step_plan: StepPlan, key: str) -> None:
    """Write a step's plan. Raise OSError if that fails."""
    assert isinstance(step_plan.micro_batches, MicroBatches)
    arrays = step_plan.samples.arrays()
    arrays |= {f"micro_batches/{name}": getattr(step_plan.micro_batches, name) for name in _MICRO_BATCHES}
    about: dict[str, Any] = {name: getattr(step_plan, name) for name in _NUMBERS}
    about |= {"key": key, "arrays": [[name, array.dtype.str, array.shape] for name, array in arrays.items()]}
    content, start = np.zeros(sum(map(_padded_bytes, arrays.values())), np.uint8), 0
    for array in arrays.values():
        content[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start += _padded_bytes(array)
    about["sum"] = _sum(content)
    header = json.dumps(about).encode()
    with open(path, "wb") as file:
        file.write(header + b" " * (-(len(header) + 1) % _ALIGNMENT) + b"\n")
        file.write(content)  # type: ignore[arg-type]


def read_plan(path: Path, step: int, key: str) -> StepPlan | None:
    """Return the memory-mapped plan in a file, or None if the file is incomplete or of another step or run."""
    try:
        with open(path, "rb") as file:
            about = json.loads(file.readline())
            start, size = file.tell(), os.fstat(file.fileno()).st_size
            if about["key"] != key or about["step"] != step:
                return None
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if _sum(np.frombuffer(content, np.uint8, offset=start)) != about["sum"]:
            return None
        arrays = {}
        for name, dtype, shape in about["arrays"]:
            arrays[name] = np.frombuffer(content, dtype, int(np.prod(shape)), start).reshape(shape)
            start += _padded_bytes(arrays[name])
        if start != size:
            return None
        micro_batches = MicroBatches(*(arrays.pop(f"micro_batches/{name}") for name in _MICRO_BATCHES))
        samples = StepSamples.from_arrays(arrays)
        return StepPlan(samples=samples, micro_batches=micro_batches, **{name: about[name] for name in _NUMBERS})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _padded_bytes(array: np.ndarray) -> int:
    """Return the number of bytes from the start of the array to that of the next one."""
    return array.nbytes + -array.nbytes % _ALIGNMENT


def _sum(content: np.ndarray) -> int:
    """Return the sum of the content's 64-bit words, modulo 2^64."""
    return int(content.view(np.uint64).sum(dtype=np.uint64))
