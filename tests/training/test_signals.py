"""A request to stop is remembered, a second one ends the process, and neither a forked child nor what follows a run keeps it."""

import os
import signal
import time

import pytest

from opt_ds.training import signals
from opt_ds.training.signals import SAME_REQUEST_S, StopRequest


def child(actions: list[int], preemption_signal: str = "SIGUSR1", pause_s: float = 0.0) -> int:
    """Exit code of a forked process that sends itself these signals within a StopRequest; 7 when it survives them."""
    process = os.fork()
    if process == 0:
        try:
            with StopRequest(preemption_signal) as stop:
                for number in actions:
                    os.kill(os.getpid(), number)
                    time.sleep(pause_s)
                os._exit(7 if stop.received == signal.Signals(actions[0]).name else 8)
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_signal_is_remembered_and_the_second_ends_the_process(number: int) -> None:
    assert child([number]) == 7
    assert child([number, number], pause_s=SAME_REQUEST_S + 0.1) == 128 + number


def test_a_launchers_sigterm_on_the_heels_of_ctrl_c_is_the_same_request() -> None:
    assert child([signal.SIGINT, signal.SIGTERM, signal.SIGTERM]) == 7


def test_the_preemption_signal_is_a_choice() -> None:
    assert child([signal.SIGUSR2], "SIGUSR2") == 7
    assert child([signal.SIGUSR1], "SIGUSR2") == -signal.SIGUSR1, "another one keeps its default action"


def test_handlers_are_put_back_also_after_an_error() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with pytest.raises(ValueError, match="broken"), StopRequest():
        assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
        raise ValueError("broken")
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_forked_worker_can_be_terminated() -> None:
    with StopRequest() as stop:
        for delay_s in (0.0, 0.0, 0.001, 0.05):  # a signal may come before the child is itself
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            time.sleep(delay_s)
            os.kill(worker, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM", "forking leaves the parent's handlers as they were"


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert child([signal.SIGHUP]) == 8, "neither ended nor asked to stop"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_launcher_is_looked_at_once_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    monkeypatch.setattr(signals, "find_launchers", lambda: ["launcher"])
    monkeypatch.setattr(signals, "is_gone", lambda launcher: looks.append(launcher) or len(looks) > 1)
    stop = StopRequest()
    assert {stop.reason() for _ in range(1000)} == {""} and len(looks) == 1
    time.sleep(signals.LOOK_EVERY_S)
    assert {stop.reason() for _ in range(1000)} == {"the launcher has ended"} and len(looks) == 2
