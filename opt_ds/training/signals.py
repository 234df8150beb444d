"""Handling of SIGTERM, SIGINT, SIGHUP and the scheduler's pre-emption signal.

A signal is recorded. All ranks agree on it at a step boundary; then the run saves and ends. A second signal ends the
process at once, unless it has the same cause as the first: a Ctrl-C under a launcher arrives as SIGINT from the
terminal and, moments later, as SIGTERM from the launcher.
"""

import os
import signal
import time
from types import FrameType, TracebackType

from opt_ds import interrupts
from opt_ds.training.launchers import find_launchers, is_gone

REQUEUE_EXIT_CODE = 75  # "saved, requeue me" (EX_TEMPFAIL of sysexits.h)
LOOK_EVERY_S = 1.0  # interval between checks of the launchers, which read /proc
SAME_REQUEST_S = 2.0  # a signal within this time after the first counts as the same request


class StopRequest:
    """Signal handlers, active while the context is entered. `received` is the name of the first signal, or ''."""

    def __init__(self, preemption_signal: str = "SIGUSR1") -> None:
        self.received = ""
        self._received_at = 0.0
        self.numbers = {signal.SIGTERM, signal.SIGINT, signal.Signals[preemption_signal]}
        if not interrupts.is_ignored(signal.SIGHUP):  # nohup ignores SIGHUP, so that the run outlives its terminal
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
        """Restore the former signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reason(self) -> str:
        """Return why the run should stop: a signal's name, or that the launcher of this rank has ended.

        Return '' otherwise.
        """
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


# A forked worker must not inherit the handlers, or a process that ends it with SIGTERM would wait for it forever. The
# signals are blocked from before the fork until the child has its former handlers back, because Python loses signals
# that arrive in between.
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
