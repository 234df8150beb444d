"""The loop of a training run, of the model (`trainer`) and of the dVAE (`opt_ds.dvae.trainer`).

It decides when metrics are logged, checkpoints are written and the run ends. A subclass does the steps and says what a
checkpoint holds.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_ds.training import checkpoint
from opt_ds.training.checkpoint_writer import CheckpointWriter, Contents
from opt_ds.training.distributed import ProcessGroup, SingleProcess
from opt_ds.training.metrics import Reporter
from opt_ds.training.signals import StopRequest
from opt_ds.training.time_limit import TimeLimit

_LOG = logging.getLogger(__name__)
_STOP, _WRITE_FAILED = 1, 2  # what a rank can request of all ranks at the end of a step


@dataclass(frozen=True)
class Intervals:
    """When a run ends, and the number of steps between two log lines and between two checkpoints."""

    last_step: int
    log_every: int
    save_every: int


class TrainingLoop(ABC):
    """One training run in the folder `output`, from `state.step` to the last step.

    All ranks of `group` call the same methods in the same order.
    """

    def __init__(
        self,
        output: Path,
        group: ProcessGroup | SingleProcess,
        state: Any,
        intervals: Intervals,
        stop: StopRequest,
        time_limit: TimeLimit,
        writer: CheckpointWriter,
        is_resumed: bool,
    ) -> None:
        """Prepare the loop and open the run's metrics.

        Args:
            output: The run's output directory.
            group: The ranks of the run.
            state: Progress of the run, with the number of completed steps as `step`.
            intervals: End of the run, and intervals of logs and checkpoints.
            stop: Receives the signals that ask the run to stop. The caller enters its context.
            time_limit: Time limit of this launch.
            writer: Writer of the run's checkpoints.
            is_resumed: Whether `state` is that of a checkpoint, which is then not written again.
        """
        self.output, self.group, self.state, self.stop = output, group, state, stop
        self.writer = writer
        self.report = Reporter(output, state.step, intervals.last_step, group.ranks.is_main)
        self._intervals, self._time_limit = intervals, time_limit
        self._saved_step = state.step if is_resumed else -1

    # ---- what a subclass defines

    @abstractmethod
    def take_steps(self) -> Iterator[None]:
        """Take the remaining steps. Yield after each one; the loop then counts it in `state.step`."""

    @abstractmethod
    def log(self) -> dict[str, str]:
        """Report the metrics since the last call. Return the status for the progress bar."""

    @abstractmethod
    def contents(self) -> Contents:
        """Return what a checkpoint of this step holds."""

    def after_step(self) -> None:  # noqa: B027 - optional
        """Do what is due after a step besides logs and checkpoints."""

    def ends_early(self) -> bool:
        """Return whether the run is finished before the last step."""
        return False

    def is_best(self) -> bool:
        """Return whether this step is the best one so far, to which "best" then points."""
        return False

    def paused(self) -> AbstractContextManager[Any]:
        """Return a context for work that does not count as training time."""
        return nullcontext()

    # ---- what all runs share

    def run(self) -> str:
        """Run the steps. Return the reason for a stop before the end, or '' if the run is finished.

        The last step is saved in both cases.

        Raise CheckpointError on every rank if a checkpoint cannot be written.
        """
        if self._time_limit.source:
            level = logging.WARNING if self._time_limit.is_short() else logging.INFO
            _LOG.log(level, self._time_limit.describe())
        stopped = ""
        for _ in self.take_steps():
            self.state.step += 1
            self.report.advance(self.log() if self.is_due(self._intervals.log_every) else None)
            with self.paused():
                self.after_step()
                if self.is_due(self._intervals.save_every) or self.ends_early():
                    self.save()
            if self.ends_early():
                break
            stopped = self._requested_stop()
            if stopped:
                self.save()
                break
        self.writer.wait()
        return stopped

    def is_due(self, every: int) -> bool:
        """Return whether an action that runs every `every` steps is due after this step.

        It is also due after the last step.
        """
        return self.state.step % every == 0 or self.state.step == self._intervals.last_step

    def save(self) -> Path:
        """Start writing the checkpoint of this step, once per step. Return its folder."""
        if self._saved_step != self.state.step:
            self.writer.save(self.contents(), best=self.is_best())
            self._saved_step = self.state.step
        return self.output / checkpoint.FOLDER / checkpoint.folder_name(self.state.step)

    def close(self) -> None:
        """Close the threads and files of the run. This is called however the run ended."""
        self.writer.close()
        self.report.close()

    def _requested_stop(self) -> str:
        """Return why the ranks should stop after this step, or ''. All ranks agree on it."""
        is_near, is_last = self._time_limit.is_near(), self.state.step == self._intervals.last_step
        reason = self.stop.reason()
        asks_to_stop = not is_last and (reason or is_near)
        request = self.group.max(_WRITE_FAILED if self.writer.has_failed else _STOP if asks_to_stop else 0)
        if request == _WRITE_FAILED:
            self.writer.wait()  # raises
        if request != _STOP:
            return ""
        return reason or ("time limit" if is_near else "a signal to another rank")
