"""Two ranks: the same step and curve as one, whatever the micro-batching. They are started once for this whole file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ds.config import Config
from opt_ds.data.plan import StepPlan
from opt_ds.store.reader import FeatureStore
from tests.engine.runs import CURVE, free_port, hashes, losses, rank_environment, tensors, tiny_config, train

QUIET = ("model.dropout=0", "model.attention_dropout=0")
# Widths cut so that a micro-batch can be small: the longest sample has 24 + 2 + 8 + 4 + 25 + 64 positions.
ONE_STEP = (*QUIET, "model.max_regions=8", "model.max_frames=4", "batch.size=40", "optimizer.clip_norm=0",
            "train.max_steps=1")  # fmt: skip


def curve(store: Path, steps: int, *more: str) -> Config:
    return tiny_config(store, *CURVE, f"train.max_steps={steps}", *more)


@pytest.fixture(scope="module")
def folder(store: Path, learnable: Path, tmp_path_factory: pytest.TempPathFactory, group: Any) -> Path:
    """Every run of this file: those of one rank made here, those of two by `two_ranks.py`."""
    folder = tmp_path_factory.mktemp("ranks")
    train(tiny_config(store, *ONE_STEP, "batch.max_tokens=4096"), folder / "1x1", group)
    train(tiny_config(store, *ONE_STEP, "batch.max_tokens=155"), folder / "1x8", group)
    train(curve(learnable, 12), folder / "one", group)
    train(curve(learnable, 4), folder / "1-2-1", group)
    two = [
        (tiny_config(store, *ONE_STEP, "batch.max_tokens=200"), "2x3"),
        (curve(learnable, 8, "zero.stage=3"), "1-2-1"),
        (tiny_config(store, "train.max_steps=6"), "two straight"),
        (tiny_config(store, "train.max_steps=3"), "two cut"),
        (tiny_config(store, "train.max_steps=6"), "two cut"),
    ]
    jobs = folder / "jobs.json"
    described = [{"config": config.model_dump(mode="json"), "output": str(folder / name)} for config, name in two]
    jobs.write_text(json.dumps(described))
    port = free_port()
    command = [sys.executable, "-m", "tests.engine.two_ranks", str(jobs)]
    ranks = [subprocess.Popen(command, env=rank_environment(rank, 2, port)) for rank in range(2)]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    train(curve(learnable, 12), folder / "1-2-1", group)
    return folder


def test_loss_and_gradients_do_not_depend_on_ranks_and_micro_batches(store: Path, folder: Path) -> None:
    for ranks, tokens, expected in ((1, 4096, 1), (1, 155, 8), (2, 200, 3)):
        plan = StepPlan(tiny_config(store, *ONE_STEP, f"batch.max_tokens={tokens}"), [FeatureStore(store)])
        assert len(plan.step(0, ranks).micro_batches[0]) == expected
    # After one step from moments of 0, exp_avg is 0.1 × the gradient.
    reference = tensors(folder / "1x1", 1, "moments")
    norm = torch.stack([t.norm() for name, t in reference.items() if name.endswith("exp_avg")]).norm()
    for other in ("1x8", "2x3"):
        assert losses(folder / other)[1] == pytest.approx(losses(folder / "1x1")[1], rel=1e-5)
        found = tensors(folder / other, 1, "moments")
        for name, expected_moment in reference.items():
            if name.endswith("exp_avg"):
                error = (found[name] - expected_moment).norm()
                assert error <= 1e-5 * max(expected_moment.norm(), 1e-3 * norm), name


def test_the_curve_goes_on_from_one_rank_to_two_at_stage_three_and_back(folder: Path) -> None:
    expected, found = losses(folder / "one"), losses(folder / "1-2-1")
    assert found.keys() == expected.keys()
    assert max(abs(found[step] / expected[step] - 1) for step in expected) <= 1e-4


def test_two_ranks_resume_bit_exactly_with_dropout(folder: Path) -> None:
    assert hashes(folder / "two cut", 6) == hashes(folder / "two straight", 6)


def test_only_rank_zero_writes(folder: Path) -> None:
    assert (
        len((folder / "two straight" / "metrics.jsonl").read_text().splitlines()) == 6 + 1
    )  # six steps, one validation
    assert len(json.loads((folder / "two cut" / "run.json").read_text())["launches"]) == 2
