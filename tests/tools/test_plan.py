"""`opt-ds plan`: the budget that it finds is the largest that fits, and its figures follow from each other."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_ds.config import load_config
from opt_ds.data.flops import step_flops
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.step_samples import select
from opt_ds.errors import UserError
from opt_ds.store.reader import FeatureStore
from opt_ds.tools import plan as planning
from opt_ds.tools.assumed_store import AssumedStore
from opt_ds.tools.plan import Cluster, communication_bytes, estimate_run, estimate_text
from opt_ds.training.hardware import GPUS, Gpu, find_gpu
from tests.training.runs import FITTED, make_store

SMALL = (
    "batch.size=1024", "batch.max_tokens=2048", "model.num_layers=2", "model.text_decoder_layers=1",
    "model.image_decoder_layers=1", "model.vocab_size=4000",
)  # fmt: skip
LITTLE = Gpu("little", 2.5, (7, 0), 10e12, 1e12, 100e9, 10e9)


def plan(*settings: str, cluster: Cluster | None = None, search: bool = False):
    """For four little GPUs, if for no other; `search`: for the largest budget, which takes most of the time."""
    config = load_config("opt-small", [*SMALL, *settings])
    with pytest.MonkeyPatch.context() as patch:
        if not search:
            patch.setattr(planning, "_MOST_ROUNDS", 0)
        return estimate_run(config, cluster or Cluster(LITTLE, 4), AssumedStore(config.model, 40, 36, 65))


@pytest.fixture(scope="module")
def little():
    return plan(search=True)


def test_the_largest_budget_fits_and_a_larger_one_does_not(little) -> None:
    assert little.fits
    assert little.precision == "fp16"
    assert little.largest_budget > 2048
    at_largest = plan(f"batch.max_tokens={little.largest_budget}")
    assert 0.93 * at_largest.memory_limit < at_largest.memory.total <= at_largest.memory_limit
    beyond = plan(f"batch.max_tokens={round(little.largest_budget * 1.08)}", search=True)
    assert not beyond.fits
    assert beyond.max_tokens == pytest.approx(little.largest_budget, rel=0.05), "figures are then for what fits"


def test_what_does_not_fit_at_all_is_said() -> None:
    tiny = Gpu("tiny", 1.0, (7, 0), 10e12, 1e12, 100e9, 10e9)
    hopeless = plan(cluster=Cluster(tiny, 4), search=True)
    assert (hopeless.fits, hopeless.largest_budget) == (False, 0)
    assert "use a higher zero.stage" in estimate_text(hopeless)


def test_the_smallest_budget_holds_the_candidates_of_a_sample() -> None:
    """The search for a budget that fits goes down to the smallest one."""
    tiny = Gpu("tiny", 1.5, (7, 0), 10e12, 1e12, 100e9, 10e9)
    settings = ("batch.size=64", "tasks.matching.candidates=8", "batch.max_tokens=4096")
    hopeless = plan(*settings, cluster=Cluster(tiny, 4), search=True)
    assert (hopeless.fits, hopeless.largest_budget) == (False, 0)


def test_a_task_of_two_passes_takes_another_forward_pass_and_other_gathers() -> None:
    cluster = Cluster(LITTLE, 4)
    settings = ("batch.size=64", "tasks.alignment.width=32", "tasks.sampling_weights={alignment: 1, mlm: 1}", "zero.stage=3")
    config = load_config("opt-small", [*SMALL, *settings])
    stores: Any = [AssumedStore(config.model, 40, 36, 65)]
    found = plan(*settings, cluster=cluster)
    samples = PretrainingPlan(config, stores).step(0, 4).samples
    twice = np.flatnonzero(samples.task == list(config.tasks.units).index("alignment"))
    assert 0 < found.first_pass < found.accumulation and 0 < len(twice) < len(samples)
    forward = step_flops(config, select(samples, twice)).forward
    assert found.compute_s == pytest.approx((found.flops_per_step + forward) / 4 / (10e12 * 0.35))
    once = communication_bytes(config, "fp16", found.parameters, 4, found.accumulation)
    assert found.communication_bytes - once == pytest.approx(3 / 4 * found.parameters * 2 * found.first_pass)
    assert f"{found.accumulation} ({found.first_pass} of them run twice) of 2,048 positions" in estimate_text(found)


def test_figures_follow_from_each_other(little) -> None:
    assert 130 < little.accumulation * 4 * 2048 * little.packing_efficiency / 1024 < 180, "positions of a sample"
    assert little.compute_s == pytest.approx(little.flops_per_step / 4 / (10e12 * 0.35))
    assert little.total_s == pytest.approx(100_000 * (little.compute_s + little.communication_s))
    assert little.bytes_per_sample == pytest.approx(36 * 2048 * 2 + 65 * 768 * 2, rel=0.05)
    assert little.read_rate == pytest.approx(little.bytes_per_sample * 1024 / little.step_s)
    one = plan(cluster=Cluster(LITTLE, 1))
    assert one.compute_s == pytest.approx(4 * little.compute_s)
    assert one.communication_bytes == 0
    assert one.memory.optimizer == 4 * little.memory.optimizer


def test_stages_and_offload_move_memory_and_traffic(little) -> None:
    third = plan("zero.stage=3")
    assert third.memory.optimizer == little.memory.optimizer
    assert third.memory.gradients < little.memory.gradients
    assert third.communication_bytes > 2 * little.communication_bytes
    offload = plan("zero.stage=2", "zero.offload_optimizer=true")
    assert offload.memory.optimizer == 0
    assert offload.memory.host == little.memory.optimizer


def test_traffic_is_that_of_ring_algorithms() -> None:
    base = load_config("opt-base")
    assert communication_bytes(base, "fp16", 100, 4, 8) == pytest.approx(75 * (4 + 2))
    second = load_config("opt-base", ["zero.stage=2"])
    assert communication_bytes(second, "fp16", 100, 4, 8) == pytest.approx(75 * (4 * 8 + 2))


def test_a_slow_network_becomes_the_bound() -> None:
    result = plan(cluster=Cluster(LITTLE, 16, gpus_per_node=4, network_bandwidth=1e9 / 8))
    assert result.bound == "communication"
    assert "bound by communication" in estimate_text(result)


def test_a_precision_that_the_gpu_cannot_do_right_is_refused() -> None:
    with pytest.raises(UserError, match=r"zero\.stage"):
        plan("zero.stage=0")


def test_the_help_names_every_gpu_of_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from opt_ds.cli import _build
    from opt_ds.cli.program import run_command

    monkeypatch.setenv("COLUMNS", "400")
    assert run_command(_build(), ["plan", "--help"], "opt-ds") == 0
    assert f"{', '.join(GPUS)}, cpu or custom" in " ".join(capsys.readouterr().out.split())


def test_the_command_reads_a_store_and_writes_json(tmp_path: Path) -> None:

    from opt_ds.cli import _build
    from opt_ds.cli.program import run_command

    store = make_store(tmp_path / "store")
    settings = [word for setting in FITTED for word in ("--set", setting)]
    command = ["plan", "--config", "opt-tiny", "--gpu", "V100", "--store", str(store), "--json", str(tmp_path / "plan.json")]
    assert run_command(_build(), [*command, *settings], "opt-ds") == 0
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["memory"]["total"] == pytest.approx(sum(v for k, v in figures["memory"].items() if k not in ("total", "host")))
    assert figures["gpu"] == find_gpu("V100").name
    assert str(FeatureStore(store).path) == figures["samples"]
    assert run_command(_build(), ["plan", "--gpu", "V200"], "opt-ds") == 2
    assert run_command(_build(), ["plan", "--gpu", "custom"], "opt-ds") == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--num-gpus 16 --network-gbit 0", "--network-gbit 0"),
        ("--gpu custom --memory-gib nan --tflops 1", "--memory-gib nan"),
        ("--gpu custom --memory-gib 1 --tflops 0", "--tflops 0"),
        ("--gpu custom --memory-gib 1 --tflops 1 --link-gbyte -1", "--link-gbyte -1"),
        ("--gpu custom --memory-gib 1 --tflops inf", "--tflops inf"),
    ],
)
def test_numbers_that_no_machine_has_are_refused_before_anything_is_planned(
    options: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from opt_ds.cli import _build
    from opt_ds.cli.program import run_command

    monkeypatch.setattr(planning, "estimate_run", None)
    assert run_command(_build(), ["plan", *options.split()], "opt-ds") == 2
    assert named in capsys.readouterr().err
