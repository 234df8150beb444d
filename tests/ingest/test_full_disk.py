"""Test a disk that fills up while a store is made: one line, no partial files, and the same command resumes."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from opt_ds.errors import RunError, UserError
from opt_ds.ingest import prepare
from opt_ds.store import inspect_store
from opt_ds.store import writer as writer_module
from tests.ingest.conftest import SETTINGS
from tests.ingest.test_pipeline import contents
from tests.small_disk import SmallDisk

_PROGRAM = """
import sys
from pathlib import Path
from opt_ds.cli.program import run_program
from opt_ds.cli.data import prepare
if __name__ == "__main__":
    sys.exit(run_program(prepare, sys.argv[1:], "opt-ds prepare"))
"""


@pytest.mark.parametrize("message", [None, "Can't synchronously write data (No space left on device)"])
def test_no_space_is_one_line_and_the_same_call_goes_on(
    messy_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str | None
) -> None:
    """Make the write of the second shard fail, with an error number or, like HDF5, with a message."""
    real, calls = writer_module.write_datasets, []

    def fail_second(path: Path, *arguments: object, **options: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, "No space left on device") if message is None else OSError(message)
        real(path, *arguments, **options)

    output, quiet = tmp_path / "store", {"workers": 1, "device": "cpu"}
    with monkeypatch.context() as patched:
        patched.setattr(writer_module, "write_datasets", fail_second)
        with pytest.raises(UserError, match="the disk is full: free space and run the same command again, it resumes"):
            prepare(messy_manifest, output, SETTINGS, **quiet)
    assert not (output / "store.json").exists()
    assert [path.name for path in output.glob("shard-*.h5")] == ["shard-00000.h5"]
    assert not list(output.glob(".*.tmp"))
    if message is None:
        return
    whole = (output / "shard-00000.h5").stat().st_mtime_ns
    prepare(messy_manifest, output, SETTINGS, **quiet)
    assert (output / "shard-00000.h5").stat().st_mtime_ns == whole
    assert inspect_store(output).failures == []


@pytest.mark.faults
def test_a_real_full_disk(messy_manifest: Path, tmp_path: Path, small_disk: SmallDisk) -> None:
    small_disk.resize(400)
    script, output = tmp_path / "run.py", small_disk.folder / "store"
    script.write_text(_PROGRAM)
    command = [sys.executable, str(script), "--manifest", str(messy_manifest), "--output", str(output), "--device",
               "cpu", "--workers", "1", "--samples-per-shard", "3", "--vocab-size", "80"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    full = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert full.returncode == 2, full.stderr
    assert "the disk is full" in full.stderr
    assert "Traceback" not in full.stderr
    small_disk.resize(65536)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    prepare(messy_manifest, tmp_path / "undisturbed", SETTINGS, workers=1, device="cpu")
    assert contents(output) == contents(tmp_path / "undisturbed")


def test_workers_that_are_killed_are_replaced_and_nothing_is_lost(
    messy_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the system runs out of memory: the worker dies by SIGKILL while it works."""
    from opt_ds.ingest import workers

    real = workers._tasks

    def tasks_then_kill(*arguments: object) -> object:
        for task in real(*arguments):
            yield task
            for process in _children():
                os.kill(process, signal.SIGKILL)

    prepare(messy_manifest, tmp_path / "undisturbed", SETTINGS, workers=1, device="cpu")
    monkeypatch.setattr(workers, "_tasks", tasks_then_kill)
    prepare(messy_manifest, tmp_path / "store", SETTINGS, workers=1, device="cpu")
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_workers_that_are_always_killed_end_the_run_in_one_line(messy_manifest: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(0.05):
            for process in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(RunError, match=r"ended from outside before they read a file .*run the same command again") as error:
            prepare(messy_manifest, tmp_path / "store", SETTINGS, workers=1, device="cpu")
    finally:
        stop.set()
        killer.join()
    assert "\n" not in str(error.value)


def _children() -> list[int]:
    """The worker processes of this one (not the resource tracker)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_text()
        except OSError:
            continue
        if parent == os.getpid() and "spawn_main" in command:
            found.append(int(entry.name))
    return found
