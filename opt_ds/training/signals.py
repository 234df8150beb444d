"""SIGTERM, SIGINT, SIGHUP and the scheduler's pre-emption signal: remembered, agreed upon by all ranks at a step boundary, then
the run saves and ends. A second signal ends the process at once, unless it belongs to the first: a Ctrl-C under a launcher
arrives as SIGINT from the terminal and, moments later, as SIGTERM from the launcher.
"""

import os
import signal
import time
from types import FrameType, TracebackType

from opt_ds import interrupts
from opt_ds.training.launchers import find_launchers, is_gone

REQUEUE_EXIT_CODE = 75  # "save done, requeue me" (EX_TEMPFAIL of sysexits.h)
LOOK_EVERY_S = 1.0  # at the launchers, which takes reading /proc
SAME_REQUEST_S = 2.0  # a signal so soon after the first says nothing new


class StopRequest:
    """While entered, `received` is the name of the first signal that asked to stop, '' while there is none."""

    def __init__(self, preemption_signal: str = "SIGUSR1") -> None:
        self.received = ""
        self._received_at = 0.0
        self.numbers = {signal.SIGTERM, signal.SIGINT, signal.Signals[preemption_signal]}
        if not interrupts.is_ignored(signal.SIGHUP):  # nohup ignores it: the run outlives its terminal
            self.numbers.add(signal.SIGHUP)
        self._launchers = find_launchers()
        self._is_abandoned, self._looked_at = False, -LOOK_EVERY_S
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._handle) for number in self.numbers}
        _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _entered.remove(self)
        self.put_back()

    def put_back(self) -> None:
        """Give the signals their former handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reason(self) -> str:
        """What asks to stop: the signal's name, or the loss of the launcher that started this rank; '' while nothing does."""
        if self.received or not self._launchers:
            return self.received
        now = time.monotonic()
        if not self._is_abandoned and now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self._is_abandoned = any(is_gone(launcher) for launcher in self._launchers)
        return "the launcher has ended" if self._is_abandoned else ""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            interrupts.leave_lost_terminal()
        if not self.received:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._received_at > SAME_REQUEST_S:
            os._exit(128 + number)


# A forked worker must not inherit the handlers, or whoever ends it with SIGTERM would wait for it for ever. From before the
# fork until the child has its former handlers back the signals are blocked: Python forgets those that arrive in between.
_entered: list[StopRequest] = []
_masks: list[set[int]] = []


def _before_fork() -> None:
    if _entered:
        _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, _entered[-1].numbers))


def _after_fork_in_parent() -> None:
    if _masks:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _after_fork_in_child() -> None:
    while _entered:
        _entered.pop().put_back()
    interrupts.put_back_handlers()
    _after_fork_in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
