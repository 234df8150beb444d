"""The launchers among a rank's ancestors (deepspeed, torchrun, srun's step), and whether one of them has ended.

A shell, tmux or nohup is no launcher: a rank that was started from one goes on without it.
"""

import os
from pathlib import Path
from typing import NamedTuple

_PROGRAMS = {"deepspeed", "torchrun"}
_MODULES = {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch"}
_STEP = "slurmstepd"


class Launcher(NamedTuple):
    """A process; its start time tells it from a later one of the same number."""

    pid: int
    started: str


def find_launchers() -> list[Launcher]:
    """The launchers among this process's ancestors, the nearest first; none where the system has no /proc."""
    found, pid = [], os.getppid()
    while pid > 1 and (status := _status(pid)):
        if _is_launcher(_command(pid)):
            found.append(Launcher(pid, status[19]))
        pid = int(status[1])
    return found


def is_gone(launcher: Launcher) -> bool:
    """Whether it has ended, also if its parent has not collected its exit code yet."""
    status = _status(launcher.pid)
    return not status or status[0] in "ZX" or status[19] != launcher.started


def _status(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on: 0 is the state, 1 the parent, 19 the start time."""
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
