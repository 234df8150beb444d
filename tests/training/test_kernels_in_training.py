"""The compiled operators really drive a training run: the emulated CUDA kernels give PyTorch's loss, and our dropout does not
depend on ranks and micro-batches."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ds.model.opt import OPT
from opt_ds.ops import backend
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import total_loss
from tests.tiny import make_batches
from tests.training.runs import hashes, losses, tensors, tiny_config, train

NO_DROPOUT = ("model.dropout=0", "model.attention_dropout=0")


@pytest.fixture(autouse=True)
def choose_again() -> Iterator[None]:
    yield
    backend.choose("auto", "cpu")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_two_steps_on_the_emulated_kernels_are_two_steps_of_the_reference(
    dropout: float, store: Path, tmp_path: Path, group: Any
) -> None:
    """Without dropout, PyTorch is the reference. With dropout, it is the CPU operators, which use the same random bits."""
    names = ("emulator", "torch" if dropout == 0 else "fused")
    for name in names:
        settings = [f"ops.backend={name}", f"model.dropout={dropout}", f"model.attention_dropout={dropout}", "batch.size=6"]
        train(tiny_config(store, *settings, "train.max_steps=2", "zero.stage=0"), tmp_path / name, group)
        launch = json.loads((tmp_path / name / "run.json").read_text())["launches"][0]
        assert launch["kernels"] == f"layer_norm: {name}, attention: {name}, dropout: {name}", "stored with the run"
    found, expected = (losses(tmp_path / name) for name in names)
    assert found.keys() == expected.keys() == {1, 2}
    assert all(found[step] == pytest.approx(expected[step], rel=2e-5) for step in found)
    for name, moment in tensors(tmp_path / names[1], 2, "moments").items():
        error = (tensors(tmp_path / names[0], 2, "moments")[name] - moment).norm()
        assert error <= 1e-3 * moment.norm() + 1e-6, name


@pytest.mark.parametrize("settings", [("zero.stage=3",), ("zero.stage=1", "train.recompute=true")])
def test_our_operators_keep_what_backward_needs(settings: tuple[str, ...], store: Path, tmp_path: Path, group: Any) -> None:
    """Stage 3 releases the weights after forward, and recomputation repeats everything else. The steps are the same."""
    for name, how in (("plain", ("zero.stage=1",)), ("other", settings)):
        config = tiny_config(store, "ops.backend=fused", "batch.size=6", "batch.max_tokens=300", "train.max_steps=3", *how)
        assert train(config, tmp_path / name, group) == 0
    expected = losses(tmp_path / "plain")
    assert len(expected) == 3 and losses(tmp_path / "other") == pytest.approx(expected, rel=1e-6)


def one_step(store: Path, precision: torch.dtype, *settings: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step's micro-batches, without an engine."""
    config = tiny_config(store, *settings)
    stores = [FeatureStore(store)]
    from opt_ds.data.pretraining_plan import PretrainingPlan

    step_plan = PretrainingPlan(config, stores).step(0)
    torch.manual_seed(0)
    model = OPT(config.model, config.tasks).to(precision).train()
    loss = torch.zeros(())
    for k, batch in enumerate(make_batches(config, stores, step_plan)[0]):
        backend.seed_dropout(config.seed, 0, 0, k)
        part = total_loss(model(batch), step_plan.counts, config.tasks, 1)
        part.backward()
        loss += part.detach().float()
    return float(loss), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def test_half_precision_on_the_emulated_tensor_cores(store: Path) -> None:
    """Heads of 32 in fp16: the V100's m8n8k4 kernels, against PyTorch's fp16 and against fp32."""
    sizes = ("model.hidden_size=64", "model.num_heads=2", "batch.size=4", *NO_DROPOUT)
    found = {}
    for name, precision in (("emulator", torch.float16), ("torch", torch.float16), ("torch", torch.float32)):
        backend.choose(name, "cpu")
        found[name, precision] = one_step(store, precision, *sizes)
    exact_loss, exact = found["torch", torch.float32]
    ours, torchs = (found[name, torch.float16] for name in ("emulator", "torch"))
    assert ours[0] == pytest.approx(exact_loss, rel=2e-3)
    norm = torch.stack([g.norm() for g in exact.values()]).norm()

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return float(torch.stack([(gradients[name] - g).norm() for name, g in exact.items()]).norm() / norm)

    assert error(ours[1]) <= 2 * error(torchs[1]) + 1e-3


def test_our_dropout_does_not_depend_on_micro_batches(store: Path) -> None:
    sizes = ("model.max_regions=8", "model.max_frames=4", "batch.size=24", "model.dropout=0.2", "model.attention_dropout=0.2")
    backend.choose("fused", "cpu")
    whole, whole_gradients = one_step(store, torch.float32, *sizes, "batch.max_tokens=4096")
    cut, cut_gradients = one_step(store, torch.float32, *sizes, "batch.max_tokens=155")
    assert cut == pytest.approx(whole, rel=1e-5)
    norm = torch.stack([g.norm() for g in whole_gradients.values()]).norm()
    for name, gradient in whole_gradients.items():
        assert (cut_gradients[name] - gradient).norm() <= 1e-5 * norm, name
    other, _ = one_step(store, torch.float32, *sizes, "batch.max_tokens=4096", "seed=2")
    assert other != pytest.approx(whole, rel=1e-5), "another seed drops other elements"


def test_a_run_with_our_dropout_resumes_bit_exactly(store: Path, tmp_path: Path, group: Any) -> None:
    for output, steps in (("straight", 4), ("cut", 2), ("cut", 4)):
        train(tiny_config(store, "ops.backend=fused", f"train.max_steps={steps}"), tmp_path / output, group)
    assert hashes(tmp_path / "cut", 4) == hashes(tmp_path / "straight", 4)
