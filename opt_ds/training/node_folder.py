"""In-memory folder through which the ranks of one node exchange files during one launch.

The node's first rank creates it, holds a lock in it and removes it at the end. The next launch on the node removes what
a killed launch left behind, because its lock is free.
"""

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from opt_ds.data.shared_plans import SharedPlans, is_worth_sharing, make_inboxes
from opt_ds.data.step_plan import Plan
from opt_ds.log import EVERY_RANK

if TYPE_CHECKING:
    from opt_ds.training.distributed import ProcessGroup

_LOG = logging.getLogger(__name__)
_MEMORY = Path("/dev/shm")
_PREFIX = "opt-ds-ranks-"
_LOCK = ".lock"


def share_plans(plan: Plan, group: "ProcessGroup") -> tuple[SharedPlans | None, "NodeFolder | None"]:
    """Return the step plan as this node's ranks share it, and their folder, which the caller closes.

    All ranks of the run must call this together. Return (None, None) if there is nothing to share: the rank is alone on
    its node, or the steps have few samples.
    """
    if group.ranks.world_size == 1 or not is_worth_sharing(plan):
        return None, None
    folder = NodeFolder(group)
    if folder.is_own:
        make_inboxes(folder.path, folder.count)
    group.barrier()
    if folder.count == 1:
        return None, None

    if not folder.path.is_dir():
        if folder.place == 0:
            _LOG.warning(
                f"{folder.path} cannot be made: each rank of this node plans every step itself, which changes nothing else",
                extra=EVERY_RANK,
            )
        return None, None
    return SharedPlans(plan, group.ranks.world_size, folder.path, folder.place, folder.count), folder


class NodeFolder:
    """The folder of one node's ranks. This rank is number `place` of the node's `count` ranks.

    All ranks of the run must create it together.
    """

    def __init__(self, group: "ProcessGroup") -> None:
        base = _base()
        token, own = group.from_main(secrets.token_hex(8)), _node(base)
        nodes = group.gather(own)
        ranks = [rank for rank, node in enumerate(nodes) if node == own]
        self.place, self.count = ranks.index(group.ranks.rank), len(ranks)
        self.path = base / f"{_PREFIX}{token}-{ranks[0]}"
        self._lock: IO[str] | None = None
        if self.place == 0 and self.count > 1:
            remove_leftovers(base)
            self._lock = _make(self.path)

    @property
    def is_own(self) -> bool:
        """Whether this rank created the folder."""
        return self._lock is not None

    def close(self) -> None:
        """Remove the folder if this rank created it."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.close()
            self._lock = None


def remove_leftovers(base: Path) -> None:
    """Remove this user's folders whose launch has ended."""
    for folder in base.glob(f"{_PREFIX}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            with open(folder / _LOCK, "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use, or removed by another launch
            continue


def _make(path: Path) -> IO[str] | None:
    """Create the folder and lock it before it gets its final name. Return None if it cannot be created."""
    hidden = path.with_name(f".{path.name}")
    try:
        hidden.mkdir(mode=0o700)
        lock = open(hidden / _LOCK, "w")  # noqa: SIM115 - open for as long as the run lasts
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(path)
    except OSError:
        shutil.rmtree(hidden, ignore_errors=True)
        return None
    return lock


def _base() -> Path:
    return _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def _node(base: Path) -> tuple[str, int]:
    """Return what only processes that see the same folder have in common: the running kernel and the file system."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = os.uname().nodename
    return boot, base.stat().st_dev
