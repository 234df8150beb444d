"""What ends a command early: Ctrl-C, SIGTERM, a lost terminal (SIGHUP). Only its main process answers; it ends the others."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_before: "dict[int, signal._HANDLER]" = {}  # the handlers outside `ended_by_signals`
_last: int = signal.SIGINT  # a KeyboardInterrupt is Python's own, unless one of the others came


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does. A SIGHUP that is ignored (nohup) stays so."""
    global _last
    _last = signal.SIGINT
    if threading.current_thread() is not threading.main_thread() or _before:
        yield
        return
    numbers = [signal.SIGTERM, *([] if is_ignored(signal.SIGHUP) else [signal.SIGHUP])]
    _before.update({number: signal.signal(number, _interrupt) for number in numbers})
    try:
        yield
    finally:
        put_back_handlers()
        _before.clear()


def is_ignored(number: int) -> bool:
    """Return whether this process was started with this signal ignored, as nohup does with SIGHUP."""
    return signal.getsignal(number) == signal.SIG_IGN


def stopped_exit_code() -> int:
    """Return the exit code of a command that was interrupted: 128 plus the number of the signal."""
    return 128 + _last


def let_signals_end_at_once() -> None:
    """From now on the signals end the process: whoever asks again does not want to wait for what still ends."""
    for number in _ASKING:
        if not is_ignored(number):
            signal.signal(number, signal.SIG_DFL)


def keep_exit_code() -> None:
    """After a KeyboardInterrupt: let this process end with the code that it is given.

    CPython notes that a KeyboardInterrupt left an `exec` of text, such as that of a namedtuple's class. Until the next `exec`,
    `python -m` would end by SIGINT instead (Py_RunMain).
    """
    exec("")


def leave_lost_terminal() -> None:
    """After SIGHUP: what is still written to a terminal that is gone goes nowhere, instead of failing."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)


def put_back_handlers() -> None:
    """Give SIGTERM and SIGHUP the handlers that they had outside `ended_by_signals`."""
    for number, handler in _before.items():
        signal.signal(number, handler)


@contextmanager
def uninterrupted_children() -> Iterator[None]:
    """Processes that this thread starts meanwhile never receive SIGINT and SIGHUP, not even while they load their libraries.

    A signal that asks this process to end waits until the end of the block.
    """
    received: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {}
    if in_main_thread:  # another thread may take the signal: this one would be interrupted nevertheless
        asking = [number for number in _ASKING if callable(signal.getsignal(number))]
        handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in asking}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for first in received[:1]:
            signal.raise_signal(first)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _last
    _last = number
    if number == signal.SIGHUP:
        leave_lost_terminal()
    raise KeyboardInterrupt


os.register_at_fork(after_in_child=put_back_handlers)
