"""The one exception for a user's mistake, and the "did you mean" that goes with it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can fix. The message is one line: what is wrong, where, and how to fix it.

    Commands print it without a traceback and exit with code 2 (bad input).
    """


class RunError(RuntimeError):
    """A running command cannot continue. The message is one line: the reason, and where the state is saved.

    The exit code is 1.
    """


class TrainingStoppedError(Exception):
    """A signal asked training to stop, and its state is saved. `reason`: the signal's name; `step`: the last one taken."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(f"{reason}: saved after step {step}")
        self.reason, self.step = reason, step


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean "x"?)' for the known word nearest to `word`, or '' when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f' (did you mean "{near[0]}"?)' if near else ""
