"""Fewer kernels change no bit: fp32 sums of half-precision gradients, and the search for overflows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ds.model.opt import OPT
from opt_ds.training import checkpoint, deepspeed_internals, gradients
from opt_ds.training.deepspeed_config import Precision
from opt_ds.training.trainer import parameter_groups
from tests.training.runs import tiny_config, train


@pytest.mark.parametrize(("precision", "stage", "chunk"), [("fp16", 1, 20_000), ("fp16", 2, 10**9), ("bf16", 1, 20_000)])
def test_a_run_has_deepspeeds_own_weights(
    precision: Precision, stage: int, chunk: int, store: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    file = tmp_path / "ds.json"
    # 2^18 overflows at first: the steps that are not taken must be the same too.
    more = ', "initial_scale_power": 18, "hysteresis": 1' if precision == "fp16" else ""
    file.write_text(f'{{"{precision}": {{"enabled": true{more}}}}}')
    config = tiny_config(store, f"deepspeed_config={file}", f"zero.stage={stage}", "batch.max_tokens=300", "train.max_steps=10")

    def states(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
        assert train(config, tmp_path / name, group, precision) == 0
        saved = checkpoint.find_resumable(tmp_path / name)
        assert saved is not None
        model = OPT(config.model, config.tasks)
        checkpoint.load_weights(model, saved)
        return checkpoint.train_state(checkpoint.read_state(saved)).adam_steps, dict(model.state_dict())

    monkeypatch.setattr(gradients, "_CHUNK", chunk)
    together: list[int] = []  # gradients that were added to their sums at once
    add_to_sums = gradients.add_to_sums
    monkeypatch.setattr(gradients, "add_to_sums", lambda sums, found: (together.append(len(sums)), add_to_sums(sums, found)))
    steps, ours = states("ours")
    assert bool(together) == (stage == 1), "stage 2 sums in its own partitions"
    if stage == 1:
        num_parameters = len(list(OPT(config.model, config.tasks).parameters()))
        assert 1 < max(together) < num_parameters, "several chunks, of several parameters"
    monkeypatch.setattr(deepspeed_internals, "use_few_kernels", lambda engine: None)
    their_steps, theirs = states("theirs")
    assert 0 < steps == their_steps and (steps < 10) == (precision == "fp16")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_element_is_an_overflow(bad: float, dtype: torch.dtype) -> None:
    found = {0: [torch.full((300,), 6e4, dtype=dtype), torch.zeros(0, dtype=dtype)], 1: [torch.ones(5, dtype=dtype)]}
    assert not gradients.any_not_finite(found)
    found[1][0][3] = bad
    assert gradients.any_not_finite(found)
    assert not gradients.any_not_finite({})


def test_weights_of_odd_size_do_not_unalign_others(store: Path) -> None:
    config = tiny_config(store)
    model = OPT(config.model, config.tasks)
    groups = parameter_groups(model, 0.01)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        odd = [p.numel() % 8 != 0 for p in group["params"]]
        assert odd == sorted(odd)
    assert any(p.numel() % 8 for p in groups[1]["params"]), "or this shows nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_in_pieces_are_plain_sums(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_PIECE", 64)
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(63,), (64,), (65,), (), (0, 3), (7, 40)]
    found = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    found.append(torch.randn(30, 20, generator=generator).to(dtype).t())  # as products leave some gradients
    sums = [torch.randn(gradient.shape, generator=generator) for gradient in found]
    expected = [total + gradient.float() for total, gradient in zip(sums, found, strict=True)]
    gradients.add_to_sums(sums, found)
    assert all(torch.equal(ours, plain) for ours, plain in zip(sums, expected, strict=True))
