"""Runs one program and ends all that came of it: `python keeper.py COMMAND…`.

A daemon's children leave its session and its process group (slurmd's do), so neither reaches them. The keeper makes itself the
parent of every orphan among its descendants (PR_SET_CHILD_SUBREAPER); at SIGTERM, or when its own parent dies, it kills the
whole tree. Killing the keeper of a Slurm node simulates a power failure of that node.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def descendants(root: int) -> list[int]:
    """Process ids of all living descendants, zombies left out."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(folder.name))
    found, waiting = [], [root]
    while waiting:
        own = children.get(waiting.pop(), [])
        found += own
        waiting += own
    return found


def kill_descendants() -> None:
    """Kill them all; again until none is left, since they may fork meanwhile."""
    while living := descendants(os.getpid()):
        for process in living:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
    while _next_dead_child() is not None:
        pass


def _next_dead_child() -> int | None:
    """Wait for a child to end and return its id, or None if there is no child left."""
    try:
        return os.wait()[0]
    except ChildProcessError:
        return None


def main() -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def stop(number: int, frame: object) -> None:
        kill_descendants()
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    program = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    while (dead := _next_dead_child()) is not None and dead != program.pid:
        pass
    kill_descendants()


if __name__ == "__main__":
    main()
