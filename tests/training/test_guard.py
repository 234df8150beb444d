"""Steps that are not finite are skipped within a budget and named; jumps are noticed; ranks that drift apart are found."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opt_ds.config import GuardConfig
from opt_ds.data.modalities import IMAGE
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.sample import Sample
from opt_ds.data.samples import SampleReader
from opt_ds.data.step_samples import StepSamples
from opt_ds.store.reader import FeatureStore
from opt_ds.training import checkpoint
from opt_ds.training.guard import Guard, TrainingError, differing_parameter
from tests.training.runs import CURVE, hashes, losses, tensors, tiny_config, train


@pytest.fixture
def poison(store: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Put a NaN into the features of one sample of each of these training steps, and return the samples' names."""

    def poison_steps(*steps: int) -> list[str]:
        config = tiny_config(store)
        stores = [FeatureStore(store)]
        plan, read, poisoned = PretrainingPlan(config, stores), SampleReader.read, set()
        for step in steps:
            samples = plan.step(step).samples
            index = next(index for index in range(len(samples)) if samples.input_rows[index, IMAGE] >= 0)
            poisoned.add((int(samples.epoch[index]), int(samples.sample[index])))

        def read_poisoned(self: SampleReader, samples: StepSamples, index: int) -> Sample:
            sample = read(self, samples, index)
            if (int(samples.epoch[index]), int(samples.sample[index])) in poisoned:
                sample.items[IMAGE].features = np.full_like(sample.items[IMAGE].features, math.nan)
            return sample

        monkeypatch.setattr(SampleReader, "read", read_poisoned)
        return [f"{stores[0].name}/{stores[0].sample_id(sample)}" for _, sample in sorted(poisoned)]

    return poison_steps


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (1, "fp16")])
def test_a_step_that_is_not_finite_is_skipped_named_and_dumped(
    stage: int, precision: str, store: Path, tmp_path: Path, group: Any, poison: Callable[..., list[str]],
    logged: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if precision == "fp16":
        from deepspeed.accelerator import get_accelerator

        monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    names = poison(2, 4)
    config = tiny_config(store, f"zero.stage={stage}", "train.max_steps=6", "guard.skip_budget=2", "optimizer.lr=1e-4")
    assert train(config, tmp_path, group, precision) == 0
    said = "\n".join(logged)
    assert "step 2: the loss " in said and "step skipped (2 of at most 2 in 1000)" in said
    assert all(name in said for name in names)
    dump = torch.load(tmp_path / "guard" / "step-00000002-rank-0.pt", weights_only=True)
    assert dump["step"] == 2 and dump["not_finite"] and set(dump["samples"]) <= set(dump["batch"]["sample_names"])
    if stage < 3:
        assert len(dump["samples"]) == 1 and dump["samples"][0] in names, "the sample itself is found"
    assert dump["batch"]["inputs"]["parts"][IMAGE]["features"].isnan().any()
    assert all(t.isfinite().all() for name in ("model", "moments") for t in tensors(tmp_path, 6, name).values())
    state = checkpoint.read_state(tmp_path / "checkpoints" / "step-00000006")
    assert state["guard"]["skipped"] == [2, 4] and state["step"] == 6
    assert not {3, 5} & losses(tmp_path).keys(), "a NaN is no training loss"
    if precision != "fp16":  # there an overflow may have skipped more
        assert state["adam_steps"] == 4


def test_beyond_the_budget_the_run_ends_with_the_state_before_and_goes_on_when_allowed(
    store: Path, tmp_path: Path, group: Any, poison: Callable[..., list[str]]
) -> None:
    poison(1, 2, 4)
    settings = ("train.max_steps=6", "guard.skip_window=3")
    with pytest.raises(TrainingError, match=r"step 2: the loss .* not finite.*skip_budget is 1") as error:
        train(tiny_config(store, *settings, "guard.skip_budget=1"), tmp_path, group)
    saved = checkpoint.find_resumable(tmp_path)
    assert saved is not None and saved.name == "step-00000002" and saved.name in str(error.value)
    assert train(tiny_config(store, *settings, "guard.skip_budget=2"), tmp_path, group) == 0
    state = checkpoint.read_state(tmp_path / "checkpoints" / "step-00000006")
    assert state["guard"]["num_skipped"] == 3 and state["guard"]["skipped"] == [2, 4], "step 1 has left the window"


def test_a_skipped_step_leaves_no_trace_in_the_weights(
    store: Path, tmp_path: Path, group: Any, poison: Callable[..., list[str]]
) -> None:
    poison(3)
    for stage in (0, 1):
        config = tiny_config(store, f"zero.stage={stage}", "train.max_steps=4", "checkpoint.every_steps=3")
        train(config, tmp_path / str(stage), group)
        assert hashes(tmp_path / str(stage), 4) == hashes(tmp_path / str(stage), 3)


def test_a_gradient_that_is_not_finite_lists_the_steps_samples(
    store: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    from opt_ds.model.opt import OPT

    calls = []

    def break_gradient(module: OPT, *_: Any) -> None:
        calls.append(module)
        if len(calls) == 3:
            handle = module.embeddings.text.word.weight.register_hook(lambda g: handle.remove() or g * math.inf)

    original = OPT.forward
    monkeypatch.setattr(OPT, "forward", lambda self, batch: (break_gradient(self), original(self, batch))[1])
    config = tiny_config(store, "zero.stage=0", "train.max_steps=4", "train.validate_every=1000000")
    assert train(config, tmp_path, group) == 0
    assert any("step 2: the gradient is not finite" in line for line in logged)
    names = json.loads((tmp_path / "guard" / "step-00000002.json").read_text())["samples_by_rank"]
    assert len(names) == 1 and len(names[0]) == 12
    assert all(t.isfinite().all() for t in tensors(tmp_path, 4, "model").values())


def test_a_spike_is_said_and_if_wanted_not_taken(
    learnable: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    import opt_ds.training.step as step_module

    total_loss = step_module.total_loss
    calls = []

    def jumping(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return total_loss(*arguments) * (100.0 if len(calls) % 30 == 25 else 1.0)

    monkeypatch.setattr(step_module, "total_loss", jumping)
    for name, skip in (("warned", False), ("skipped", True)):
        calls.clear()
        logged.clear()
        settings = ("train.max_steps=28", f"guard.skip_spikes={str(skip).lower()}", "checkpoint.every_steps=24")
        train(tiny_config(learnable, *CURVE, *settings), tmp_path / name, group)
        said = "\n".join(logged)
        assert "step 24: loss" in said and "is a spike" in said
        assert ("step skipped" in said) == skip
        state = checkpoint.read_state(tmp_path / name / "checkpoints" / "step-00000028")
        assert state["guard"]["num_spikes"] >= 1 and state["adam_steps"] == 28 - skip
    lines = [json.loads(line) for line in (tmp_path / "warned" / "metrics.jsonl").read_text().splitlines()]
    assert [line["guard/spikes"] > 0 for line in lines if line["kind"] == "train"] == [False] * 24 + [True] * 4


def test_verdicts_follow_the_history_alone() -> None:
    guard = Guard(GuardConfig(spike_zscore=5, spike_window=50))
    values = [1 + 0.1 * math.sin(7 * i) for i in range(60)]
    assert {guard.judge_loss(value)[0] for value in values} == {"fine"}
    assert guard.judge_loss(math.nan)[0] == guard.judge_loss(math.inf)[0] == "not finite"
    assert guard.judge_loss(0.0)[0] == "fine", "a fall is no spike"
    assert guard.judge_loss(9.0)[0] == "spike"
    assert len(guard.state.losses) == 50 and not guard.state.gradient_norms
    flat = Guard(GuardConfig(spike_zscore=5))
    assert {flat.judge_loss(1.0)[0] for _ in range(40)} == {"fine"}, "equal values deviate by nothing"
    assert Guard(GuardConfig(spike_zscore=5)).judge_loss(1e9)[0] == "fine", "too little history"


def test_a_flipped_bit_of_one_rank_is_found_by_name() -> None:
    class Others:
        def __init__(self, other: torch.nn.Module) -> None:
            self.other = other

        def gather(self, own: list[int]) -> list[list[int]]:
            mine = Others(self.other)
            mine.gather = lambda sums: [sums]  # type: ignore[method-assign]
            theirs: list[list[int]] = []
            mine.gather = lambda sums: theirs.append(sums) or [sums]  # type: ignore[method-assign,func-returns-value]
            differing_parameter(self.other, mine)  # type: ignore[arg-type]
            return [own, theirs[0]]

    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        own, other = (torch.nn.Linear(5, 3).to(dtype) for _ in range(2))
        other.load_state_dict(own.state_dict())
        assert differing_parameter(own, Others(other)) is None  # type: ignore[arg-type]
        with torch.no_grad():
            other.bias.view(torch.int32 if dtype == torch.float32 else torch.int16)[1] ^= 1
        assert differing_parameter(own, Others(other)) == "bias"  # type: ignore[arg-type]
