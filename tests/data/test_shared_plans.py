"""Test plans shared by the ranks of a node: the same bits from every rank; a slow, missing or wrong rank changes nothing."""

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_ds.data import shared_plans
from opt_ds.data.modalities import TEXT
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.shared_plans import SharedPlans, make_inboxes, read_plan, write_plan
from opt_ds.data.step_plan import StepPlan
from opt_ds.store import FeatureStore
from tests.tiny import make_batches, make_config

RANKS = 3  # of the run
_FORK = multiprocessing.get_context("fork")


@pytest.fixture
def plan(complete: FeatureStore) -> PretrainingPlan:
    return PretrainingPlan(make_config(batch={"size": 200}), [complete])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_inboxes(tmp_path, 2)
    return tmp_path


def contents(step_plan: StepPlan) -> list[Any]:
    """Return the complete plan of a step in a comparable form."""
    arrays = list(step_plan.samples.arrays().values())
    assigned = [[(m.indices.tobytes(), m.num_tokens, m.cost) for m in rank] for rank in step_plan.micro_batches]
    numbers = [
        step_plan.step,
        step_plan.counts,
        step_plan.num_tokens,
        step_plan.packing_efficiency,
        step_plan.load_imbalance,
        step_plan.flops,
    ]
    return [*numbers, step_plan.num_samples, assigned, *((a.dtype, a.shape, a.tobytes()) for a in arrays)]


def are_right(plan: PretrainingPlan, steps: list[StepPlan]) -> bool:
    return all(contents(step_plan) == contents(plan.step(step_plan.step, RANKS)) for step_plan in steps)


def test_a_file_gives_back_every_bit(plan: PretrainingPlan, tmp_path: Path) -> None:
    step_plan = plan.step(4, RANKS)
    write_plan(tmp_path / "4", step_plan, "key")
    found = read_plan(tmp_path / "4", 4, "key")
    assert found is not None and contents(found) == contents(step_plan)


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share) // 64 * 64]


@pytest.mark.parametrize(
    "damage",
    [
        _cut(0.0), _cut(0.01), _cut(0.5), _cut(0.999),
        lambda content: content + bytes(64),
        lambda content: content[:-1],
        lambda content: content[:-3000] + bytes([content[-3000] ^ 1]) + content[-2999:],
        lambda content: b"{}\n" + content,
        lambda content: content.replace(b'"key": "key"', b'"key": "yek"'),
        lambda content: bytes(len(content)),
    ],
)  # fmt: skip
def test_a_damaged_file_is_no_plan(damage: Callable[[bytes], bytes], plan: PretrainingPlan, tmp_path: Path) -> None:
    path = tmp_path / "4"
    write_plan(path, plan.step(4, RANKS), "key")
    path.write_bytes(damage(path.read_bytes()))
    assert read_plan(path, 4, "key") is None


def test_another_step_or_run_is_no_plan(plan: PretrainingPlan, tmp_path: Path) -> None:
    write_plan(tmp_path / "4", plan.step(4, RANKS), "key")
    assert read_plan(tmp_path / "4", 5, "key") is None
    assert read_plan(tmp_path / "4", 4, "other") is None


def _run(plan: PretrainingPlan, folder: Path, place: int, first: int, last: int, dies_at: int | None, out: Any) -> None:
    """Run a rank in a separate process."""
    shared = SharedPlans(plan, RANKS, folder, place, 2)
    found = []
    for step_plan in shared.steps(first, last):
        if step_plan.step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        found.append(contents(step_plan))
    out.put((place, found, shared.num_read, shared.num_missed))


def _start(
    plan: PretrainingPlan, folder: Path, place: int, first: int, last: int, dies_at: int | None = None
) -> tuple[Any, Any]:
    out = _FORK.Queue()
    process = _FORK.Process(target=_run, args=(plan, folder, place, first, last, dies_at, out))
    process.start()
    return process, out


@pytest.mark.parametrize("first", [0, 7])
def test_two_processes_plan_half_of_the_steps_each(first: int, plan: PretrainingPlan, folder: Path) -> None:
    last = first + 9
    running = [_start(plan, folder, place, first, last) for place in (0, 1)]
    expected = [contents(plan.step(step, RANKS)) for step in range(first, last)]
    for process, out in running:
        place, found, num_read, num_missed = out.get(timeout=60)
        process.join(60)
        assert found == expected
        assert num_missed == 0 and num_read == sum(step % 2 != place for step in range(first, last))
    assert not [file for file in folder.rglob("*") if file.is_file()], "read files are removed"


def test_a_killed_rank_is_done_without(
    plan: PretrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setattr(shared_plans, "_WAIT_S", 0.3)
    process, _ = _start(plan, folder, 1, 0, 20, dies_at=5)
    shared = SharedPlans(plan, RANKS, folder, 0, 2)
    steps = list(shared.steps(0, 14))
    process.join(60)
    assert [step_plan.step for step_plan in steps] == list(range(14)) and are_right(plan, steps)
    assert shared.num_read + shared.num_missed == 7 and shared.num_missed >= 4
    assert len(logged) == 1 and "rank 1 of this node" in logged[0]


def test_files_of_another_run_and_torn_ones_are_planned_again(
    plan: PretrainingPlan, folder: Path, complete: FeatureStore
) -> None:
    other = PretrainingPlan(make_config(batch={"size": 200}, seed=9), [complete])
    inbox = folder / "rank-0"
    write_plan(inbox / "1", other.step(1, RANKS), shared_plans._key_of(other, RANKS))
    write_plan(inbox / "3", plan.step(3, RANKS), shared_plans._key_of(plan, RANKS))
    with open(inbox / "3", "r+b") as file:
        file.truncate(1000)
    write_plan(inbox / "5", plan.step(5, RANKS), shared_plans._key_of(plan, RANKS))
    shared = SharedPlans(plan, RANKS, folder, 0, 2)
    steps = list(shared.steps(0, 6))
    assert are_right(plan, steps)
    assert (shared.num_read, shared.num_missed) == (1, 2)
    assert not os.listdir(inbox)


def test_what_nobody_reads_is_bounded(plan: PretrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_plans, "_WAIT_S", 0.0)
    monkeypatch.setattr(shared_plans, "_WAIT_PLANS", 0.0)
    monkeypatch.setattr(shared_plans, "_MOST_WAITING", 3)
    assert are_right(plan, list(SharedPlans(plan, RANKS, folder, 0, 2).steps(0, 12)))
    assert sorted(os.listdir(folder / "rank-1")) == ["0", "2", "4"]
    late = SharedPlans(plan, RANKS, folder, 1, 2)
    assert are_right(plan, list(late.steps(3, 6)))
    assert not os.listdir(folder / "rank-1"), "what came too late goes too"


def test_without_room_or_folder_each_plans_for_itself(
    plan: PretrainingPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setattr(shared_plans, "_WAIT_S", 0.0)
    monkeypatch.setattr(shared_plans, "_WAIT_PLANS", 0.0)
    shared = SharedPlans(plan, RANKS, tmp_path / "gone", 0, 2)
    assert are_right(plan, list(shared.steps(0, 4)))
    assert len(logged) == 1 and "gone" in logged[0]


def test_a_shared_plan_packs_the_same_batches(plan: PretrainingPlan, complete: FeatureStore, tmp_path: Path) -> None:
    step_plan = plan.step(2, RANKS)
    write_plan(tmp_path / "2", step_plan, "key")
    found = read_plan(tmp_path / "2", 2, "key")
    assert found is not None
    batches = []
    for each in (step_plan, found):
        own = dataclasses.replace(each, micro_batches=[each.micro_batches[1]])
        batches.append(make_batches(plan.config, [complete], own)[0])
    for mine, theirs in zip(*batches, strict=True):
        assert mine.sample_names == theirs.sample_names
        np.testing.assert_array_equal(mine.inputs.parts[TEXT].ids, theirs.inputs.parts[TEXT].ids)
