"""Two and four ranks: the same step and curve as one, whatever the micro-batching. They are started once for this whole file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ds.config import Config
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.store.reader import FeatureStore
from opt_ds.training.finetuning import finetune_config
from tests.training.runs import CURVE, free_port, hashes, losses, rank_environment, tensors, tiny_config, train, zero_moments
from tests.warm import WarmProcess

pytestmark = pytest.mark.timeout(900)

QUIET = ("model.dropout=0", "model.attention_dropout=0")
# Small widths, so that a micro-batch can be small: the longest sample has 24 + 2 + 8 + 4 + 25 + 64 positions.
ONE_STEP = (*QUIET, "model.max_regions=8", "model.max_frames=4", "batch.size=40", "optimizer.clip_norm=0",
            "train.max_steps=1")  # fmt: skip
#: Options that change what a step sums up: several captions per sample, sums per sample, norms in the embeddings.
OPTIONS = ("tasks.matching.candidates=3", "tasks.reduction=sample", "model.normalize_embedding_summands=true")


def tuned(store: Path, start: Path) -> Config:
    """Fine-tuning for retrieval: every rank samples the same hard negatives."""
    more = (*QUIET, "train.max_steps=4", "train.log_every=1", "batch.size=12", "optimizer.clip_norm=0",
            "evaluate.every_steps=2", "evaluate.limit=6")  # fmt: skip
    return finetune_config("retrieval", start, [str(store)], settings=more)


def curve(store: Path, steps: int, *more: str) -> Config:
    return tiny_config(store, *CURVE, f"train.max_steps={steps}", *more)


STAGES = (1, 2, 3)
SWITCH_EVERY = 5  # steps; on one rank, two, four, and one again


@pytest.fixture(scope="module")
def folder(store: Path, learnable: Path, tmp_path_factory: pytest.TempPathFactory, group: Any) -> Path:
    """Every run of this file: those of one rank made here, those of more by `job_ranks.py`."""
    folder = tmp_path_factory.mktemp("ranks")

    def switched(part: int) -> list[tuple[Config, str]]:
        """The runs that change their ranks, up to the end of this part."""
        steps = SWITCH_EVERY * part
        return [(curve(learnable, steps, f"zero.stage={stage}"), f"switched-{stage}") for stage in STAGES]

    train(tiny_config(store, *ONE_STEP, "batch.max_tokens=4096"), folder / "1x1", group)
    train(tiny_config(store, *ONE_STEP, "batch.max_tokens=155"), folder / "1x8", group)
    train(tiny_config(store, *ONE_STEP, *OPTIONS, "batch.max_tokens=4096"), folder / "options 1x1", group)
    train(tiny_config(store, *ONE_STEP, *OPTIONS, "batch.max_tokens=155"), folder / "options 1x8", group)
    train(curve(learnable, 4 * SWITCH_EVERY), folder / "one", group)
    train(tiny_config(store, "train.max_steps=1"), folder / "start", group)
    train(tuned(store, folder / "start"), folder / "tuned one", group)
    for config, name in switched(1):
        train(config, folder / name, group)
    shutil.copytree(folder / "switched-1", folder / "control")
    zero_moments(folder / "control", SWITCH_EVERY)
    two = [
        (tiny_config(store, *ONE_STEP, "batch.max_tokens=200"), "2x3"),
        (tiny_config(store, *ONE_STEP, *OPTIONS, "batch.max_tokens=200", "zero.stage=3"), "options 2x3"),
        (tiny_config(store, *OPTIONS, "train.max_steps=4", "train.log_gradients_every=2"), "options straight"),
        (tiny_config(store, *OPTIONS, "train.max_steps=2"), "options cut"),
        (tiny_config(store, *OPTIONS, "train.max_steps=4"), "options cut"),
        (tiny_config(store, "train.max_steps=6"), "two straight"),
        (tiny_config(store, "train.max_steps=3"), "two cut"),
        (tiny_config(store, "train.max_steps=6"), "two cut"),
        (curve(learnable, 2 * SWITCH_EVERY), "control"),
        (tuned(store, folder / "start"), "tuned two"),
        *switched(2),
    ]
    _start_ranks(2, two, folder)
    _start_ranks(4, switched(3), folder)
    for config, name in switched(4):
        train(config, folder / name, group)
    return folder


def _start_ranks(world_size: int, runs: list[tuple[Config, str]], folder: Path) -> None:
    jobs = folder / "jobs.json"
    described = [{"config": config.model_dump(mode="json"), "output": str(folder / name)} for config, name in runs]
    jobs.write_text(json.dumps(described))
    port = free_port()
    command = ["-m", "tests.training.job_ranks", str(jobs)]
    ranks = [WarmProcess(command, rank_environment(rank, world_size, port)) for rank in range(world_size)]
    outcomes = [rank.communicate(timeout=280) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, outcomes


def test_loss_and_gradients_do_not_depend_on_ranks_and_micro_batches(store: Path, folder: Path) -> None:
    for ranks, tokens, expected in ((1, 4096, 1), (1, 155, 8), (2, 200, 3)):
        plan = PretrainingPlan(tiny_config(store, *ONE_STEP, f"batch.max_tokens={tokens}"), [FeatureStore(store)])
        assert len(plan.step(0, ranks).micro_batches[0]) == expected
    assert_same_step(folder, "1x1", ("1x8", "2x3"))


def assert_same_step(folder: Path, first: str, others: tuple[str, ...]) -> None:
    """Compare losses and gradients of runs of one step."""
    # After one step from moments of 0, exp_avg is 0.1 × the gradient.
    reference = tensors(folder / first, 1, "moments")
    norm = torch.stack([t.norm() for name, t in reference.items() if name.endswith("exp_avg")]).norm()
    for other in others:
        assert losses(folder / other)[1] == pytest.approx(losses(folder / first)[1], rel=1e-5)
        found = tensors(folder / other, 1, "moments")
        for name, expected_moment in reference.items():
            if name.endswith("exp_avg"):
                error = (found[name] - expected_moment).norm()
                assert error <= 1e-5 * max(expected_moment.norm(), 1e-3 * norm), name


def test_candidates_and_sums_per_sample_do_not_depend_on_ranks_and_micro_batches(store: Path, folder: Path) -> None:
    config = tiny_config(store, *ONE_STEP, *OPTIONS, "batch.max_tokens=155")
    step_plan = PretrainingPlan(config, [FeatureStore(store)]).step(0)
    assert len(step_plan.micro_batches[0]) > 4 and step_plan.num_copies > 4
    assert_same_step(folder, "options 1x1", ("options 1x8", "options 2x3"))


def test_candidates_resume_bit_exactly_on_two_ranks(folder: Path) -> None:
    """One of the runs also measures the losses' gradients, which changes nothing."""
    assert hashes(folder / "options cut", 4) == hashes(folder / "options straight", 4)
    lines = [json.loads(line) for line in (folder / "options straight" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "gradients"] == [2, 4]


@pytest.mark.parametrize("stage", STAGES)
def test_the_curve_goes_on_from_one_rank_to_two_to_four_and_back(folder: Path, stage: int) -> None:
    expected, found = losses(folder / "one"), losses(folder / f"switched-{stage}")
    assert list(found) == list(expected) == list(range(1, 4 * SWITCH_EVERY + 1))
    assert expected[4 * SWITCH_EVERY] < 0.8 * expected[1], "the loss must fall, or equal curves would show nothing"
    assert max(abs(found[step] / expected[step] - 1) for step in expected) <= 1e-4
    launches = json.loads((folder / f"switched-{stage}" / "run.json").read_text())["launches"]
    assert [launch["ranks"][0] for launch in launches] == ["1", "2", "4", "1"]


def test_moments_lost_at_a_switch_would_show(folder: Path) -> None:
    expected, found = losses(folder / "one"), losses(folder / "control")
    assert max(abs(found[step] / expected[step] - 1) for step in found) > 1e-3


def test_two_ranks_resume_bit_exactly_with_dropout(folder: Path) -> None:
    assert hashes(folder / "two cut", 6) == hashes(folder / "two straight", 6)


def test_fine_tuning_is_the_same_on_two_ranks(folder: Path) -> None:
    expected, found = losses(folder / "tuned one"), losses(folder / "tuned two")
    assert list(found) == [1, 2, 3, 4]
    assert max(abs(found[step] / expected[step] - 1) for step in expected) <= 1e-4


def test_experiments_during_training_give_the_same_figures_on_two_ranks(folder: Path) -> None:
    def evaluations(output: Path) -> dict[int, dict[str, float]]:
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return {line.pop("step"): line for line in lines if line.pop("kind") == "evaluate"}

    expected, found = evaluations(folder / "tuned one"), evaluations(folder / "tuned two")
    assert list(expected) == list(found) == [2, 4]
    for step, figures in expected.items():
        assert {"evaluate/transcription/A+I/wer", "evaluate/retrieval/text_to_image/matching/R@1"} <= set(figures)
        assert found[step] == pytest.approx(figures, abs=1e-6)


def test_only_rank_zero_writes(folder: Path) -> None:
    assert (
        len((folder / "two straight" / "metrics.jsonl").read_text().splitlines()) == 6 + 1
    )  # six steps, one validation
    assert len(json.loads((folder / "two cut" / "run.json").read_text())["launches"]) == 2
