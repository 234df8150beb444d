"""Time limit of a launch, set by the scheduler or by `train.time_limit_minutes`.

Before it expires, the run saves and asks to be requeued.
"""

import os
import time
from collections.abc import Callable, Mapping

from opt_ds.config import TrainConfig
from opt_ds.errors import UserError

# Seconds since 1970; set by Slurm from 23.02 on, and by slurm/pretrain.sh before.
END_TIME_VARIABLE = "SLURM_JOB_END_TIME"


class TimeLimit:
    """End time of a launch, and the longest time between two checks of it (one step and the work that follows it).

    Each rank reads its own clock; the trainer makes the ranks agree. Without a limit the end is infinity.
    """

    def __init__(
        self,
        config: TrainConfig,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reserve_s, self._clock = config.time_reserve_s, clock
        self._longest_round_s, self._last_look = 0.0, clock()
        self.end, self.source = float("inf"), ""
        granted = environment.get(END_TIME_VARIABLE)
        if granted:
            self.end, self.source = _seconds(granted), "Slurm"
        if config.time_limit_minutes is not None and clock() + config.time_limit_minutes * 60 < self.end:
            self.end, self.source = clock() + config.time_limit_minutes * 60, "train.time_limit_minutes"

    def is_near(self) -> bool:
        """Return whether another step might not end and be saved in time. Call this once after every step."""
        now = self._clock()
        self._longest_round_s, self._last_look = max(self._longest_round_s, now - self._last_look), now
        return now + self._longest_round_s + self._reserve_s >= self.end

    def is_short(self) -> bool:
        """Return whether the remaining time is reserved for saving."""
        return self.end - self._clock() <= self._reserve_s

    def describe(self) -> str:
        """Return a line to log at the start of the run, or '' without a limit."""
        if not self.source:
            return ""
        left_s = self.end - self._clock()
        if self.is_short():
            return (
                f"{left_s:.0f} s to the time limit ({self.source}), {self._reserve_s:g} s of them kept for saving: "
                "one step, then a requeue; ask for more time, or lower train.time_reserve_s"
            )
        return (
            f"time limit: {left_s / 60:.0f} minutes from now ({self.source}); the run saves and asks to be requeued "
            f"{self._reserve_s:g} s and its longest step before that"
        )


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f'{END_TIME_VARIABLE} is "{text}": expected seconds since 1970; unset it, or correct it') from None
