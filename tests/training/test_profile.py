"""Test a trace on demand, which changes nothing, and the speed that a run reports."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from opt_ds.data.flops import step_flops
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.errors import UserError
from opt_ds.store.reader import FeatureStore
from opt_ds.training.deepspeed_config import Hardware
from opt_ds.training.hardware import GPUS, find_gpu, known_gpu, peak_flops
from tests.training.runs import hashes, tiny_config, train


def test_the_asked_for_steps_are_traced_and_the_weights_are_those_without(store: Path, tmp_path: Path, group: Any) -> None:
    train(tiny_config(store, "train.max_steps=4"), tmp_path / "plain", group)
    profiled = tiny_config(store, "train.max_steps=4", "profile.steps=1", "profile.skip=1")
    train(profiled, tmp_path / "profiled", group)
    assert hashes(tmp_path / "profiled", 4) == hashes(tmp_path / "plain", 4)
    assert not (tmp_path / "plain" / "profile").exists()
    (trace,) = (tmp_path / "profiled" / "profile").glob("*.json.gz")
    assert trace.name == "step-00000002-rank0.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"aten::bmm", "aten::addmm"} <= names
    assert "aten::" in (trace.parent / "step-00000002-rank0.txt").read_text()


def test_a_run_shorter_than_its_trace_writes_what_there_is(store: Path, tmp_path: Path, group: Any) -> None:
    train(tiny_config(store, "train.max_steps=2", "profile.steps=9", "profile.skip=1"), tmp_path / "run", group)
    assert list((tmp_path / "run" / "profile").glob("*.json.gz"))


def test_metrics_tell_utilisation_and_each_tasks_samples(store: Path, tmp_path: Path, group: Any) -> None:
    config = tiny_config(store, "train.max_steps=2")
    train(config, tmp_path / "run", group)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    plan = PretrainingPlan(config, [FeatureStore(store)])
    for line in lines[:2]:
        seconds = 1 / (line["speed/samples_per_s"] / config.batch.size)
        drawn = {name: value for name, value in line.items() if name.startswith("speed/samples_per_s/")}
        assert sum(drawn.values()) == pytest.approx(line["speed/samples_per_s"])
        assert len(drawn) >= 3
        flops = step_flops(config, plan.step(line["step"] - 1).samples).total
        assert line["speed/tflops_per_rank"] == pytest.approx(flops / seconds / 1e12, rel=1e-3)
        assert 0 < line["speed/flops_utilisation"] < 1


def test_peaks_come_from_the_data_sheet_or_from_measuring() -> None:
    v100 = Hardware("cuda", "Tesla V100-SXM2-16GB", (7, 0))
    assert peak_flops(v100, "fp16").flops_per_s == 125e12
    assert peak_flops(v100, "fp32").flops_per_s == 15.7e12
    assert "data sheet" in peak_flops(v100, "fp16").source
    assert 1e9 < peak_flops(Hardware("cpu", "a processor"), "fp32").flops_per_s < 1e14
    assert peak_flops(Hardware("cuda", "NVIDIA H200", (9, 0)), "bf16").source == "H200's data sheet"
    assert known_gpu("NVIDIA H100 80GB HBM3") is GPUS["H100-80GB"] and known_gpu("NVIDIA GeForce RTX 3090") is None
    assert find_gpu("a100-80").name == "A100-80GB"
    assert find_gpu("H100") is GPUS["H100-80GB"]
    with pytest.raises(UserError, match="V100-16GB"):
        find_gpu("V10-16GB")
