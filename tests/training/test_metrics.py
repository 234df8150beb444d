"""What a run reports: a full disk is one line of the main thread's, not a traceback of TensorBoard's."""

import errno
import threading
from pathlib import Path

import pytest

from opt_ds.training.metrics import Reporter


def test_a_full_disk_prints_no_traceback_of_a_thread_and_other_errors_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: printed.append(arguments.exc_type))
    Reporter(tmp_path, 0, 1, enabled=True).close()
    hook = threading.excepthook
    reporter = Reporter(tmp_path, 0, 1, enabled=True)
    assert threading.excepthook is hook, "one hook, however many reporters"

    def fail(error: Exception) -> None:
        raise error

    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error"), ValueError("other")):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
    reporter.close()
    assert printed == [OSError, ValueError]
