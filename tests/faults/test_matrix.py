"""The matrix of stage, ranks, precision, offload, persistence and recomputation: each combination trains as stage 0 in fp32 does,
through steps that are not taken and micro-batches without samples, and resumes bit by bit; or it is refused before training.

`make test` runs the combinations that have failed; `make test-faults` runs all and prints the table.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.faults.matrix import (
    REFERENCE,
    TOLERANCE,
    Combination,
    Outcome,
    combinations,
    difference,
    forgetful,
    run,
    run_ranks,
    verdict,
)
from tests.training.runs import make_store

ALONE = (
    Combination(2, 1, "fp16", offload=True),
    Combination(1, 1, "bf16", offload=True),
    Combination(0, 1, "fp16"),
    Combination(3, 1, "fp32", offload=True, gather_all=True),
)
TOGETHER = (
    Combination(3, 2, "fp32", gather_all=True, recompute=True),
    Combination(2, 2, "fp16", offload=True),
)
REFUSED = "zero.stage"


@pytest.fixture(scope="module")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "learnable", 8, splits={"train": 0.5, "valid": 0.5})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def reference(learnable: Path, folder: Path, group: Any) -> Outcome:
    """Stage 0, fp32, one rank."""
    found = run(REFERENCE, learnable, folder / "reference", group)
    assert found.resumed_equal and len(found.losses) > 3
    return found


def test_lost_moments_are_more_than_the_tolerance(reference: Outcome, learnable: Path, folder: Path, group: Any) -> None:
    found = forgetful(REFERENCE, learnable, folder / "reference", group)
    assert difference(found, reference.losses) > 1.2 * max(TOLERANCE.values())


@pytest.mark.parametrize("combination", ALONE, ids=lambda c: c.name)
def test_one_rank_trains_as_stage_0_or_is_refused(
    combination: Combination, reference: Outcome, learnable: Path, folder: Path, group: Any
) -> None:
    found = verdict(run(combination, learnable, folder / "alone", group), reference.losses)
    assert found.startswith("refused" if combination.stage == 0 else "passed"), found


@pytest.mark.timeout(600)
def test_two_ranks_train_as_one(reference: Outcome, learnable: Path, folder: Path) -> None:
    for outcome in run_ranks(list(TOGETHER), 2, learnable, folder / "together", 500):
        assert verdict(outcome, reference.losses).startswith("passed"), verdict(outcome, reference.losses)


def test_the_shipped_offload_settings_train_through_an_overflow(learnable: Path, folder: Path, group: Any) -> None:
    found = []
    for offload, name in ((False, "zero2_fp16"), (True, "zero2_offload_fp16")):
        setting = f"deepspeed_config={Path(__file__).parents[2] / 'ds_configs' / name}.json"
        found.append(run(Combination(2, 1, "fp16", offload), learnable, folder / name, group, setting, last=12))
    without, with_offload = found
    assert with_offload.resumed_equal and 3 < with_offload.adam_steps == without.adam_steps < 12
    assert difference(with_offload.losses, without.losses) < 1e-3


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_every_combination(reference: Outcome, learnable: Path, folder: Path) -> None:
    outcomes = [
        outcome
        for ranks in (1, 2)
        for outcome in run_ranks(combinations(ranks), ranks, learnable, folder / f"all {ranks}", 3500)
    ]
    lines = [f"{outcome.combination.name:<58} {verdict(outcome, reference.losses)}" for outcome in outcomes]
    print("\n" + "\n".join(lines))
    assert len(lines) == sum(len(combinations(ranks)) for ranks in (1, 2))
    assert not [line for line in lines if "WRONG" in line]
    for outcome in outcomes:
        wanted = outcome.combination.stage == 0 and (outcome.combination.precision != "fp32" or outcome.combination.offload)
        assert bool(outcome.refused) == wanted and (not wanted or REFUSED in outcome.refused), outcome
