"""SIGKILL at random moments, of one rank or of both, also inside saves: the final weights are those of the run never interrupted.

A survivor of a killed rank ends by itself, soon and with a message. `make test` runs a short campaign, `make test-faults` all.
"""

import random
import time
from contextlib import suppress
from pathlib import Path

import pytest

from opt_ds.training import checkpoint
from tests.faults.ranks import ranks
from tests.training.runs import hashes

STEPS_PER_KILL = 18  # more than a run does between its first step and the latest kill
VICTIMS = {"starting": [[0, 1]], "running": [[0], [1], [0, 1]], "saving": [[0], [0, 1]]}


def campaign(
    store: Path, folder: Path, precision: str, num_kills: int, seed: int, steps_per_kill: int = STEPS_PER_KILL
) -> dict[str, int]:
    """Run once without and once with kills, compare, and count what was hit."""
    chance = random.Random(seed)
    steps = steps_per_kill * num_kills
    settings = (
        f"train.max_steps={steps}", "schedule.total_steps=1000", "checkpoint.every_steps=3", "train.validate_every=7",
        "guard.rank_timeout_s=120",
    )  # fmt: skip
    with ranks(store, folder / "straight", settings, precision) as run:
        assert run.wait() == [0, 0], run.said(0)
    cut = folder / "cut"
    found = {"kills": 0, "inside a save": 0, "of one rank": 0, "starting": 0}
    while found["kills"] < num_kills:
        moment = chance.choice(["starting", "running", "running", "saving", "saving"])
        victims = chance.choice(VICTIMS[moment])
        left_behind, last_write = _being_written(cut), _last_write(cut)
        with ranks(store, cut, settings, precision) as run:
            began = _newest_step(cut)
            if moment == "starting":
                time.sleep(chance.uniform(0.1, 5.0))
            elif moment == "running":
                # Steps logged after the last checkpoint are still in the file: it is rewritten first.
                assert run.until(
                    lambda step=began, then=last_write: _last_write(cut) > then and _logged_steps(cut) > step
                ), run.said(0)
                time.sleep(chance.uniform(0.0, 0.8))
            else:
                assert run.until(lambda before=left_behind: _being_written(cut) - before), run.said(0)
                time.sleep(chance.uniform(0.0, 0.004))
            assert all(process.poll() is None for process in run.processes), f"ended before the kill: {run.said(0)}"
            for victim in victims:
                run.processes[victim].kill()
            if 0 in victims:
                run.processes[0].wait()
                found["inside a save"] += bool(_being_written(cut) - left_behind)
            if len(victims) == 1:
                survivor = 1 - victims[0]
                assert run.wait()[survivor] == 1, run.said(survivor)
                assert f"rank {survivor} lost contact with another rank" in run.said(survivor)
        found["kills"] += 1
        found["of one rank"] += len(victims) == 1
        found["starting"] += moment == "starting"
        complete = [f for f in checkpoint.all_checkpoints(cut) if checkpoint.problem_with(f) is None]
        assert _newest_step(cut) >= began and (not began or complete), "what was complete before the kill is still there"
    with ranks(store, cut, settings, precision) as run:
        assert run.wait() == [0, 0], run.said(0)
    assert hashes(cut, steps) == hashes(folder / "straight", steps)
    return found


def _newest_step(output: Path) -> int:
    whole = [f for f in checkpoint.all_checkpoints(output) if checkpoint.problem_with(f) is None]
    return int(whole[0].name[5:]) if whole else 0


def _being_written(output: Path) -> set[tuple[str, int]]:
    """Temporary folders of checkpoints, with their inodes: those of a killed process lie there until the next one starts."""
    found = set()
    for folder in (output / "checkpoints").glob(".step-*.tmp"):
        with suppress(FileNotFoundError):
            found.add((folder.name, folder.stat().st_ino))
    return found


def _last_write(output: Path) -> int:
    try:
        return (output / "metrics.jsonl").stat().st_mtime_ns
    except OSError:
        return 0


def _logged_steps(output: Path) -> int:
    try:
        return (output / "metrics.jsonl").read_bytes().count(b'"kind": "train"')
    except OSError:
        return 0


@pytest.mark.timeout(900)
def test_three_kills_change_nothing(store: Path, tmp_path: Path) -> None:
    assert campaign(store, tmp_path, "fp32", 3, seed=4, steps_per_kill=13)["kills"] == 3


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("precision", "num_kills"), [("fp32", 25), ("fp16", 25)])
def test_kills_at_random_moments_change_nothing(store: Path, tmp_path: Path, precision: str, num_kills: int) -> None:
    found = campaign(store, tmp_path, precision, num_kills, seed=11)
    print(f"\n{precision}: " + ", ".join(f"{count} {what}" for what, count in found.items()) + ": bit-equal")
    assert found["inside a save"] >= 3 and found["of one rank"] >= 5 and found["starting"] >= 2
