"""Counted operations are those that PyTorch counts in the real model, where no padding adds to them."""

from pathlib import Path

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from opt_ds.data.flops import step_flops
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from tests.tiny import SAMPLED_TASKS, make_config, make_model, make_packer, make_store


@pytest.mark.parametrize("draw", SAMPLED_TASKS)
def test_forward_and_backward_as_pytorch_counts_them(draw: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "equal", 40, text_len=(6, 6), regions=(5, 5), frames=(8, 8), seed=4)
    config = make_config(tasks={"sampling_weights": {draw: 1.0}}, batch={"size": 12, "max_tokens": 4096})
    step = PretrainingPlan(config, [store]).step(0)
    reader, packer = SampleReader(config, [store]), make_packer(config, [store])
    model = make_model(config)
    # Attention pads to the longest of a batch: equal lengths go together, so that nothing is padded.
    writes = np.stack([step.samples.columns["has_text_target"], step.samples.columns["has_image_target"]], axis=1)
    lengths = np.concatenate([step.samples.input_lengths, writes], axis=1)
    forward = total = 0
    for row in np.unique(lengths, axis=0):
        indices = np.flatnonzero((lengths == row).all(1))
        batch = packer.pack([reader.read(step.samples, int(index)) for index in indices])
        with FlopCounterMode(display=False) as counter:
            terms = model(batch)
        forward += counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            sum(term.sum for term in terms.values()).backward()
        total += counter.get_total_flops()
    counted = step_flops(config, step.samples)
    assert counted.forward == pytest.approx(forward, rel=0.01)
    assert counted.total == pytest.approx(forward + total, rel=0.03)


def test_a_larger_step_costs_in_proportion(complete) -> None:
    small, large = (
        step_flops(config, PretrainingPlan(config, [complete]).step(0).samples).total
        for config in (make_config(batch={"size": size, "max_tokens": 256}) for size in (40, 400))
    )
    assert large == pytest.approx(10 * small, rel=0.2)
