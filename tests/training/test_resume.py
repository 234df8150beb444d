"""Test resuming: a stopped and resumed run equals an uninterrupted one; at other ZeRO stages within rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import CURVE, hashes, losses, tensors, tiny_config, train, zero_moments


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16"), (1, "fp16")]
)
def test_resume_is_bit_exact(
    stage: int, precision: str, store: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "fp16":  # refused on a CPU by us and by DeepSpeed; here the arithmetic is what matters
        from deepspeed.accelerator import get_accelerator

        monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    settings = (f"zero.stage={stage}", "schedule.total_steps=100")
    for output, stops in ((tmp_path / "straight", (6,)), (tmp_path / "cut", (3, 6))):
        for stop in stops:
            assert train(tiny_config(store, *settings, f"train.max_steps={stop}"), output, group, precision) == 0
    assert hashes(tmp_path / "cut", 6) == hashes(tmp_path / "straight", 6)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")


def test_a_fresh_half_precision_run_starts_from_unrounded_weights(store: Path, tmp_path: Path, group: Any) -> None:
    for precision in ("fp32", "bf16"):
        train(tiny_config(store, "optimizer.lr=1e-30", "train.max_steps=1"), tmp_path / precision, group, precision)
    full, half = (tensors(tmp_path / precision, 1, "model") for precision in ("fp32", "bf16"))
    assert all(torch.allclose(half[name], tensor, rtol=0, atol=1e-20) for name, tensor in full.items())


def test_another_stage_continues_the_same_curve_and_zeroed_moments_do_not(
    learnable: Path, tmp_path: Path, group: Any
) -> None:
    def run(name: str, stage: int, stop: int) -> None:
        config = tiny_config(learnable, *CURVE, f"zero.stage={stage}", f"train.max_steps={stop}")
        train(config, tmp_path / name, group)

    run("straight", 1, 16)
    for stage, stop in ((1, 4), (3, 8), (2, 12), (0, 16)):
        run("switched", stage, stop)
    expected, found = losses(tmp_path / "straight"), losses(tmp_path / "switched")
    assert found.keys() == expected.keys()
    assert max(abs(found[step] / expected[step] - 1) for step in expected) <= 1e-4
    assert expected[16] < 0.8 * expected[1], "the loss must fall, or equal curves would show nothing"

    run("control", 1, 4)
    zero_moments(tmp_path / "control", 4)
    run("control", 1, 16)
    control = losses(tmp_path / "control")
    assert max(abs(control[step] / expected[step] - 1) for step in expected) > 1e-3
