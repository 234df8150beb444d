"""SIGTERM and SIGINT: remembered, agreed upon by all ranks at a step boundary, then the run saves and ends.

A second signal ends the process at once.
"""

import os
import signal
from types import FrameType

REQUEUE_EXIT_CODE = 75  # "save done, requeue me" (EX_TEMPFAIL of sysexits.h)


class StopRequest:
    """Installs the handlers; `received` is the first signal's name, '' while there is none."""

    def __init__(self) -> None:
        self.received = ""
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = signal.Signals(number).name
