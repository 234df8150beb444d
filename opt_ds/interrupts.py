"""Ctrl-C in a terminal reaches every process of a command. Only the main one answers it; the others are ended by it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted_children() -> Iterator[None]:
    """Processes that this thread starts meanwhile never receive SIGINT, not even while they load their libraries.

    A SIGINT for this process waits until the end of the block.
    """
    received: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # another thread may take the signal: this one would be interrupted nevertheless
        handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main_thread:
            signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        if received:
            signal.raise_signal(signal.SIGINT)
