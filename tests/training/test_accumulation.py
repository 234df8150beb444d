"""Gradients accumulate soundly in half precision: 64 micro-batches err no more than one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ds.config import Config
from opt_ds.data.loader import MicroBatchLoader
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.model.opt import OPT
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import total_loss
from opt_ds.training import deepspeed_internals
from opt_ds.training.deepspeed_config import deepspeed_settings
from tests.training.runs import tiny_config

BATCH = ("batch.size=256", "model.dropout=0", "model.attention_dropout=0", "model.max_regions=8", "model.max_frames=4",
         "optimizer.clip_norm=0")  # fmt: skip


def gradient(config: Config, precision: str, num_micro_batches: int) -> torch.Tensor:
    """The flat fp32 gradient of the first step from initial weights that are fp16 numbers, at the first loss scale that does
    not overflow."""
    settings = deepspeed_settings(config, precision, num_micro_batches)  # type: ignore[arg-type]
    if precision == "fp16":  # higher ones overflow, which takes as long to find out as a step
        settings["fp16"]["initial_scale_power"] = min(17, settings["fp16"]["initial_scale_power"])
    while not (found := _gradient(config, settings, num_micro_batches)).isfinite().all():
        settings["fp16"]["initial_scale_power"] -= 1
    return found


def _gradient(config: Config, settings: dict[str, Any], num_micro_batches: int) -> torch.Tensor:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    stores = [FeatureStore(path) for path in config.data.stores]
    plan = PretrainingPlan(config, stores)
    loader = MicroBatchLoader(plan, 0, 1, torch.device("cpu"))
    step_plan = plan.step(0)
    assert len(step_plan.micro_batches[0]) == num_micro_batches
    torch.manual_seed(config.seed)
    model = OPT(config.model, config.tasks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    adam = torch.optim.AdamW(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings, dist_init_required=False)
    deepspeed_internals.use_few_kernels(engine)
    engine.train()
    for k, micro_batch in enumerate(step_plan.micro_batches[0]):
        engine.set_gradient_accumulation_boundary(k == num_micro_batches - 1)
        terms = engine(loader.batch_of(step_plan, micro_batch.indices))
        engine.backward(total_loss(terms, step_plan.counts, config.tasks, 1), scale_wrt_gas=False)
    loader.close()
    scaled = torch.cat([safe_get_full_grad(parameter).flatten() for parameter in engine.module.parameters()])
    return scaled / deepspeed_internals.loss_scale(engine)


@pytest.mark.parametrize("stage", [1, 2])
def test_64_micro_batches_in_fp16_err_no_more_than_twice_one(
    stage: int, store: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    one, many = ("batch.max_tokens=100000",), ("batch.max_tokens=129",)

    def config(*settings: str) -> Config:
        return tiny_config(store, *BATCH, f"zero.stage={stage}", *settings)

    plan = PretrainingPlan(config(*many), [FeatureStore(store)])
    num = len(plan.step(0).micro_batches[0])
    assert num >= 64
    expected = gradient(config(*one), "fp32", 1)

    def error(found: torch.Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    single, accumulated = error(gradient(config(*one), "fp16", 1)), error(gradient(config(*many), "fp16", num))
    print(f"\nstage {stage}: one micro-batch {single:.2e}, {num} micro-batches {accumulated:.2e}")
    assert 0 < single < 0.05, "fp16 differs, but not wildly"
    assert accumulated <= 2 * single
    assert error(gradient(config(*many), "fp32", num)) <= 1e-5


@pytest.mark.parametrize(("max_tokens", "num"), [(300, 2), (100_000, 1)])
def test_gradients_that_are_reduced_during_backward_are_whole(
    max_tokens: int, num: int, store: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    file = tmp_path / "ds.json"
    tree = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5000}, "fp16": {"initial_scale_power": 12}}
    file.write_text(json.dumps(tree))
    config = tiny_config(store, "model.dropout=0", "model.attention_dropout=0", "optimizer.clip_norm=0",
                         f"batch.max_tokens={max_tokens}")  # fmt: skip
    expected = gradient(config, "fp32", num)
    found = gradient(config.model_copy(update={"deepspeed_config": str(file)}), "fp16", num)
    assert float((found - expected).norm() / expected.norm()) < 0.01
