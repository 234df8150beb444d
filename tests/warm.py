"""Processes that start with torch and DeepSpeed loaded: forked from one that has imported them, in tenths of a second.

Importing them takes seven seconds of a core, and the ranks of many tests start again and again. A process of its own is all the
same: own memory, own environment, own signals. Where the start of the interpreter is what matters (a launcher, a console script,
the allocator's environment), tests start it with `subprocess`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
#: The last two are imported by the first optimiser and by the run's log.
_CONTEXT.set_forkserver_preload(["torch", "deepspeed", "opt_ds.training.trainer", "torch._dynamo", "torch.utils.tensorboard"])


class WarmProcess:
    """What is needed of `subprocess.Popen` for `python COMMAND`, with stdout and stderr in files."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: str | Path | None = None,
        stdout: Path | None = None,
        stderr: Path | None = None,
    ) -> None:
        """`command`: a script, or -m and a module, and its arguments. `stdout`, `stderr`: files; None: temporary ones, which
        `communicate` returns. The same file for both keeps their order."""
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")  # goes with this object
        folder = Path(self._folder.name)
        self._stdout, self._stderr = stdout or folder / "stdout", stderr or folder / "stderr"
        for file in {self._stdout, self._stderr}:
            file.write_bytes(b"")
        task = (list(command), dict(env), str(cwd or os.getcwd()), str(self._stdout), str(self._stderr))
        self._process = _CONTEXT.Process(target=_run, args=task)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; the negative number of the signal that ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("warm process", timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and stderr, once it has ended."""
        self.wait(timeout)
        return self._stdout.read_text(), self._stderr.read_text()

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            # The server reaps a process that has ended before it reports the exit code.
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(command: list[str], environment: dict[str, str], folder: str, stdout: str, stderr: str) -> None:
    for stream, file in ((1, stdout), (2, stderr)):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process leaves without them
