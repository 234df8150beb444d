"""Test the time limit: from the environment or the configuration, with time left for a step and for saving."""

from pathlib import Path
from typing import Any

import pytest

from opt_ds.config import TrainConfig
from opt_ds.errors import UserError
from opt_ds.training import checkpoint
from opt_ds.training.signals import REQUEUE_EXIT_CODE
from opt_ds.training.time_limit import END_TIME_VARIABLE, TimeLimit
from tests.training.runs import hashes, tiny_config, train


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, environment: dict[str, str], **settings: float) -> TimeLimit:
    return TimeLimit(TrainConfig(**settings), environment, clock)  # type: ignore[arg-type]


def test_it_is_near_when_the_longest_step_and_the_reserve_no_longer_fit() -> None:
    clock = Clock()
    limit = make(clock, {END_TIME_VARIABLE: "2000"}, time_reserve_s=100)
    looks = []
    for seconds in (300, 50, 200, 50):  # at 1300, 1350, 1550, 1600: and 1600 + 300 + 100 is the end
        clock.now += seconds
        looks.append(limit.is_near())
    assert looks == [False, False, False, True]


def test_the_nearer_of_two_limits_counts() -> None:
    clock = Clock()
    assert make(clock, {}).end == float("inf")
    assert not make(clock, {}).is_near()
    assert make(clock, {}).describe() == ""
    assert make(clock, {END_TIME_VARIABLE: "1600"}, time_limit_minutes=5).source == "train.time_limit_minutes"
    assert make(clock, {END_TIME_VARIABLE: "1100"}, time_limit_minutes=5).source == "Slurm"
    assert "10 minutes from now (Slurm)" in make(clock, {END_TIME_VARIABLE: "1600"}).describe()
    assert "lower train.time_reserve_s" in make(clock, {END_TIME_VARIABLE: "1100"}).describe()


def test_an_unreadable_end_is_refused() -> None:
    with pytest.raises(UserError, match=END_TIME_VARIABLE):
        make(Clock(), {END_TIME_VARIABLE: "tomorrow"})


def test_a_run_out_of_time_saves_asks_for_a_requeue_and_goes_on(store: Path, tmp_path: Path, group: Any) -> None:
    straight = tiny_config(store, "train.max_steps=4")
    train(straight, tmp_path / "straight", group)
    for step in range(1, 5):  # no time is left from the beginning: each launch makes one step
        limited = tiny_config(store, "train.max_steps=4", "train.time_limit_minutes=1", "train.time_reserve_s=60")
        code = train(limited, tmp_path / "limited", group)
        last = checkpoint.find_resumable(tmp_path / "limited")
        assert last is not None
        assert last.name == f"step-{step:08d}"
        assert code == (0 if step == 4 else REQUEUE_EXIT_CODE)
    assert hashes(tmp_path / "limited", 4) == hashes(tmp_path / "straight", 4)
