"""Test a run: metrics, validation, early stopping, a non-finite loss."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ds.training import checkpoint, trainer
from opt_ds.training.trainer import TrainingError
from opt_ds.training.validation import ValidationResult
from tests.training.runs import CURVE, losses, tensors, tiny_config, train


@pytest.fixture(scope="module")
def run(learnable: Path, tmp_path_factory: pytest.TempPathFactory, group: Any) -> Path:
    """Twelve steps of a loss that falls, logged every third step, validated every sixth."""
    output = tmp_path_factory.mktemp("run")
    settings = ("train.max_steps=12", "train.log_every=3", "train.validate_every=6", "batch.max_tokens=300")
    train(tiny_config(learnable, *CURVE, *settings), output, group)
    return output


@pytest.mark.parametrize("stage", [1, 3])
def test_recomputing_layers_changes_no_curve(stage: int, store: Path, tmp_path: Path, group: Any) -> None:
    common = (f"zero.stage={stage}", "train.max_steps=3", "train.log_every=1", "batch.max_tokens=300")
    for recompute in ("false", "true"):
        train(tiny_config(store, *common, f"train.recompute={recompute}"), tmp_path / recompute, group)
    assert losses(tmp_path / "false") == losses(tmp_path / "true")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_gradient_is_clipped_to_the_norm(stage: int, store: Path, tmp_path: Path, group: Any) -> None:
    """Adam's first moments after one step are a tenth of its gradient."""
    norms = {}
    for clip in (0.0, 0.05):
        output = tmp_path / str(clip)
        train(tiny_config(store, f"zero.stage={stage}", "train.max_steps=1", f"optimizer.clip_norm={clip}"), output, group)
        moments = [m for name, m in tensors(output, 1, "moments").items() if name.endswith("exp_avg")]
        norms[clip] = float(torch.stack([m.double().norm() for m in moments]).norm()) / 0.1
        logged = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
        assert logged["optimizer/gradient_norm"] == pytest.approx(norms[0.0], rel=1e-4), "the norm is that before clipping"
    assert norms[0.0] > 0.5 and norms[0.05] == pytest.approx(0.05, rel=1e-3)


def test_the_loss_falls(run: Path) -> None:
    found = losses(run)
    assert list(found) == [3, 6, 9, 12]
    assert found[12] < found[3]


def test_the_figures_are_in_json_lines_and_in_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged, validated = ({k for line in lines if line["kind"] == kind for k in line} for kind in ("train", "valid"))
    assert {
        "train/dtr/loss", "train/dtr/accuracy", "optimizer/lr", "optimizer/gradient_norm", "optimizer/loss_scale",
        "speed/samples_per_s", "speed/tokens_per_s", "speed/packing_efficiency", "speed/data_wait_fraction",
    } <= logged  # fmt: skip
    assert {"valid/loss", "valid/dtr/loss"} <= validated
    assert "valid/mlm/loss" not in validated, "its share of the samples is 0"
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert (logged | validated) - {"step", "kind"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == [3, 6, 9, 12]
    assert any("config" in tag for tag in board.Tags()["tensors"])


def test_the_run_says_what_it_was(run: Path) -> None:
    about = json.loads((run / "run.json").read_text())
    launch = about["launches"][0]
    assert launch["precision"] == "fp32" and launch["zero_stage"] == 1 and launch["threads"] >= 1
    assert launch["freed_memory"] and launch["primitives_kept"]
    assert {"torch", "deepspeed", "python", "git"} <= set(launch["versions"])
    assert "attention" in launch["kernels"] and launch["device"]
    assert about["fixed_settings"]["model.vocab_size"] == 200
    assert (run / "config.yaml").read_text().startswith("preset: opt-tiny")


def test_a_validation_stands_beside_its_baselines(run: Path) -> None:
    table = json.loads((run / "validation.json").read_text())
    assert table["step"] == 12
    assert set(table["losses"]) <= set(table["baselines"])
    assert table["weighted_loss"] == pytest.approx(sum(table["losses"].values()))  # all weights are 1, dir is disabled


def test_early_stopping_keeps_the_best_and_is_remembered(
    store: Path, tmp_path: Path, group: Any, logged: list[str]
) -> None:
    settings = ("optimizer.lr=1.0", "train.validate_every=1", "train.early_stopping=2", "train.max_steps=30")
    config = tiny_config(store, *settings)
    assert train(config, tmp_path, group) == 0
    newest = checkpoint.find_resumable(tmp_path)
    assert newest is not None
    state = checkpoint.train_state(checkpoint.read_state(newest))
    assert state.stopped_early and state.best_step is not None and state.step == state.best_step + 2
    assert any(f"early stopping at step {state.step}" in line for line in logged)
    assert checkpoint.resolve_checkpoint(tmp_path).name == checkpoint.folder_name(state.best_step)


def test_a_validation_that_is_not_finite_is_never_the_best(
    store: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = iter([math.nan, 3.0, math.nan])
    monkeypatch.setattr(trainer, "validation_losses", lambda *_: ValidationResult({}, {}, next(totals)))
    assert train(tiny_config(store, "train.validate_every=1", "train.max_steps=3"), tmp_path, group) == 0
    state = checkpoint.read_state(tmp_path / "checkpoints" / "step-00000003")
    assert (state["best_step"], state["best_loss"], state["validations_without_gain"]) == (2, 3.0, 1)
    assert checkpoint.resolve_checkpoint(tmp_path).name == "step-00000002"


@pytest.mark.parametrize("stage", [0, 1])
def test_a_loss_that_is_not_finite_names_task_and_samples_and_saves_what_was_before(
    stage: int, store: Path, tmp_path: Path, group: Any
) -> None:
    settings = (f"zero.stage={stage}", "optimizer.lr=1e25", "train.max_steps=10")
    with pytest.raises(TrainingError) as error:
        train(tiny_config(store, *settings), tmp_path, group)
    message = str(error.value)
    assert "is not finite" in message and "small/sample" in message and "the loss " in message
    saved = checkpoint.find_resumable(tmp_path)
    assert saved is not None and saved.name in message


def test_fp16_goes_on_after_an_overflow_and_stops_at_the_smallest_scale(
    store: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    file = tmp_path / "ds.json"
    # 2^40 overflows fp16 at once; DeepSpeed halves it until gradients are finite again.
    file.write_text('{"fp16": {"enabled": true, "initial_scale_power": 40, "hysteresis": 1}}')
    config = tiny_config(store, f"deepspeed_config={file}", "train.max_steps=40")
    assert train(config, tmp_path / "overflows", group, "fp16") == 0
    saved = checkpoint.find_resumable(tmp_path / "overflows")
    assert saved is not None
    state = checkpoint.train_state(checkpoint.read_state(saved))
    assert 0 < state.adam_steps < state.step == 40
    assert 1 < state.scaler["cur_scale"] < 2**40

    least = 2.0**40
    file.write_text(
        f'{{"fp16": {{"enabled": true, "initial_scale_power": 40, "hysteresis": 1, "min_loss_scale": {least}}}}}'
    )
    with pytest.raises(TrainingError, match="the gradient is not finite at loss scale"):
        train(config, tmp_path / "minimum", group, "fp16")
    assert checkpoint.find_resumable(tmp_path / "minimum") is not None
