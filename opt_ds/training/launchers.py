"""Launchers among a rank's ancestor processes, and whether one of them has ended.

Launchers are deepspeed, torchrun and Slurm's step daemon.

A shell, tmux or nohup does not count as a launcher: a rank started from one of these keeps running when it ends.
"""

import os
from pathlib import Path
from typing import NamedTuple

_PROGRAMS = {"deepspeed", "torchrun"}
_MODULES = {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch"}
_STEP = "slurmstepd"


class Launcher(NamedTuple):
    """A process. The start time distinguishes it from a later process with the same PID."""

    pid: int
    started: str


def find_launchers() -> list[Launcher]:
    """Return the launchers among this process's ancestors, nearest first. Return none if the system has no /proc."""
    found, pid = [], os.getppid()
    while pid > 1 and (status := _status(pid)):
        if _is_launcher(_command(pid)):
            found.append(Launcher(pid, status[19]))
        pid = int(status[1])
    return found


def is_gone(launcher: Launcher) -> bool:
    """Return whether the launcher has ended, including when its parent has not yet collected its exit code."""
    status = _status(launcher.pid)
    return not status or status[0] in "ZX" or status[19] != launcher.started


def _status(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on: 0 is the state, 1 the parent's PID, 19 the start time."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _is_launcher(command: list[str]) -> bool:
    if not command:
        return False
    program = os.path.basename(command[0])
    if program in _PROGRAMS or program.startswith(_STEP):
        return True
    if not program.startswith("python"):
        return False
    arguments = command[1:]
    while arguments and arguments[0].startswith("-") and arguments[0] != "-m":
        arguments = arguments[1:]
    if arguments[:1] == ["-m"]:
        return arguments[1] in _MODULES if len(arguments) > 1 else False
    return bool(arguments) and os.path.basename(arguments[0]) in _PROGRAMS
