"""Gradient norms of the losses in the encoder: those of plain autograd, on any ranks, and without a trace in training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opt_ds.config import Config
from opt_ds.data.loader import MicroBatchLoader
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.errors import UserError
from opt_ds.model.initial import initial_model
from opt_ds.store.reader import FeatureStore
from tests.training.runs import hashes, losses, tensors, tiny_config, train

QUIET = ("model.dropout=0", "model.attention_dropout=0", "batch.size=24", "tasks.matching.candidates=3",
         "tasks.dir.weight=3", "optimizer.lr=1e-30", "train.max_steps=2")  # fmt: skip
EVERY = "train.log_gradients_every=1"


def norms(output: Path) -> dict[int, dict[str, float]]:
    """Step -> loss -> norm, from metrics.jsonl."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {key.removeprefix("gradients/"): value for key, value in line.items() if key.startswith("gradients/")}
        for line in lines
        if line["kind"] == "gradients"
    }


def reference(config: Config, step: int) -> tuple[dict[str, float], torch.Tensor]:
    """Each loss's norm by its own backward pass over the whole step as one batch; and the sum of the gradients."""
    store = FeatureStore(config.data.stores[0])
    plan, model = PretrainingPlan(config, [store]), initial_model(config, [store])
    loader = MicroBatchLoader(plan, 0, 1, torch.device("cpu"))
    step_plan, found, total = plan.step(step), {}, torch.zeros(())
    batch = loader.batch_of(step_plan, np.arange(len(step_plan.samples)))
    loader.close()
    for loss in config.tasks.active_losses:
        if not step_plan.counts[loss]:
            continue
        model.zero_grad()
        term = model(batch)[loss]
        (config.tasks.loss_weight(loss) * term.sum / term.count).backward()
        own = torch.cat([p.grad.flatten() for p in model.encoder.parameters()])
        found[loss], total = float(own.norm()), total + own
    return found, total


@pytest.mark.parametrize(("stage", "max_tokens"), [(0, 4096), (1, 300), (2, 300)])
def test_each_norm_is_that_of_its_own_backward_pass(
    stage: int, max_tokens: int, store: Path, tmp_path: Path, group: Any
) -> None:
    config = tiny_config(store, *QUIET, EVERY, f"zero.stage={stage}", f"batch.max_tokens={max_tokens}")
    train(config, tmp_path, group)
    found = norms(tmp_path)
    assert list(found) == [1, 2]
    for step, own in found.items():
        expected, _ = reference(config, step - 1)
        assert set(own) == set(expected) == {*config.tasks.active_losses}
        for loss, norm in expected.items():
            assert own[loss] == pytest.approx(norm, rel=1e-4), loss


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16"), (1, "fp16")]
)
def test_training_is_the_same_to_the_bit(
    stage: int, precision: str, store: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "fp16":
        from deepspeed.accelerator import get_accelerator

        monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    for name, every in (("off", 0), ("on", 2)):
        settings = (f"zero.stage={stage}", "train.max_steps=4", f"train.log_gradients_every={every}", "batch.max_tokens=300")
        train(tiny_config(store, *settings), tmp_path / name, group, precision)
    assert hashes(tmp_path / "on", 4) == hashes(tmp_path / "off", 4)
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    assert norms(tmp_path / "off") == {} and list(norms(tmp_path / "on")) == [2, 4]
    if precision != "fp16":  # whose first loss scales overflow, as those of the steps do
        assert all(0 < norm < 1e6 for own in norms(tmp_path / "on").values() for norm in own.values())


@pytest.mark.parametrize(("stage", "max_tokens"), [(0, 100_000), (0, 400), (2, 400)])
def test_the_norm_of_a_loss_in_two_passes_is_that_of_the_step(
    stage: int, max_tokens: int, store: Path, tmp_path: Path, group: Any
) -> None:
    settings = ("tasks.alignment.weight=2", "tasks.sampling_weights={alignment: 1}", "batch.size=32", "train.max_steps=1",
                "optimizer.clip_norm=0", f"zero.stage={stage}", f"batch.max_tokens={max_tokens}")  # fmt: skip
    train(tiny_config(store, *settings, EVERY), tmp_path, group)
    moments = tensors(tmp_path, 1, "moments")  # after one step from moments of 0, exp_avg is 0.1 × the gradient
    own = [value for name, value in moments.items() if name.startswith("encoder.") and name.endswith(".exp_avg")]
    step = 10 * float(torch.cat([value.flatten() for value in own]).norm())
    assert norms(tmp_path)[1]["alignment"] == pytest.approx(step, rel=1e-4) and step > 0.01


def test_stage_3_is_refused_in_one_line(store: Path) -> None:
    with pytest.raises(UserError, match=r"train\.log_gradients_every .* zero\.stage 3 does not allow"):
        tiny_config(store, EVERY, "zero.stage=3")
