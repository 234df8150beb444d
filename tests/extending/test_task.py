"""Test a task in a separate file (`counting.py`): trained on 2 ranks, resumed, evaluated, exported, loaded, ablated."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.config import config_from_dict, load_config
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.errors import UserError
from opt_ds.evaluation.ablation import rows_without
from opt_ds.registry import PLUGINS_VARIABLE, TASKS
from opt_ds.store.reader import FeatureStore
from opt_ds.training import checkpoint
from tests.serving.conftest import start_run
from tests.training.runs import FITTED, free_port, hashes, rank_environment
from tests.training.test_pretrain import SCRIPT
from tests.warm import WarmProcess

ROOT = Path(__file__).parents[2]
PLUGIN = "tests.extending.counting:RegionCounting"
WITH_TASK = (
    f"tasks.plugins=[{PLUGIN}]", "tasks.counting.most=6", "tasks.sampling_weights={mlm: 0.3, modality: 0.3, counting: 0.4}"
)  # fmt: skip
STEPS = 24


def ranks(store: Path, output: Path, *settings: str) -> list[WarmProcess]:
    given = (*FITTED, *WITH_TASK, f"train.max_steps={STEPS}", "schedule.total_steps=200", "optimizer.lr=0.003", *settings)
    options = [part for setting in given for part in ("--set", setting)]
    command = [str(SCRIPT), "--config", "opt-tiny", "--store", str(store), "--output", str(output), *options]
    port = free_port()
    return [
        WarmProcess(command, rank_environment(rank, 2, port) | {"PYTHONPATH": str(ROOT)}, cwd="/") for rank in range(2)
    ]


def finish(started: list[WarmProcess]) -> None:
    for process in started:
        _, error = process.communicate(240)
        assert process.returncode == 0, error


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing interrupts."""
    output = tmp_path_factory.mktemp("counting") / "whole"
    finish(ranks(store, output, "train.validate_every=12"))
    return output


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_it_is_trained_and_validated_beside_its_baseline(whole: Path) -> None:
    lines = metrics(whole)
    losses = [line["train/counting/loss"] for line in lines if "train/counting/loss" in line]
    assert len(losses) > STEPS // 2 and np.mean(losses[-5:]) < np.mean(losses[:5])
    assert any(key.endswith("samples_per_s/counting") for line in lines for key in line)
    table = json.loads((whole / "validation.json").read_text())
    assert table["baselines"]["counting"] == pytest.approx(np.log(7)) and 0 <= table["accuracies"]["counting"] <= 1


def test_a_stopped_run_goes_on_to_the_same_weights(whole: Path, store: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    started = ranks(store, output, "train.validate_every=12", "checkpoint.every_steps=5")
    while not (output / "checkpoints" / "step-00000010").is_dir():
        assert all(process.poll() is None for process in started)
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    finish(ranks(store, output, "train.validate_every=12", "checkpoint.every_steps=5"))
    assert hashes(output, STEPS) == hashes(whole, STEPS)


def test_a_checkpoint_alone_cannot_name_code(whole: Path) -> None:
    """A stranger's folder must not choose what is imported; the user may allow it."""
    def load(allowed: str | None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **({PLUGINS_VARIABLE: allowed} if allowed else {})}
        code = f"from opt_ds.training.checkpoint import load_model; print(*load_model({str(whole)!r})[0].tasks)"
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    refused = load(None)
    assert refused.returncode and f"set the environment variable {PLUGINS_VARIABLE}={PLUGIN}" in refused.stderr
    assert "counting" in load(PLUGIN).stdout.split()


def test_it_is_evaluated_exported_and_loaded(
    raw_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(PLUGINS_VARIABLE, PLUGIN)
    start_run(raw_store, tmp_path / "run", *WITH_TASK)
    command = ["evaluate", "summary", "--checkpoint", str(tmp_path / "run"), "--store", str(raw_store)]
    assert run_command(_build(), [*command, "--output", str(tmp_path / "summary.json")], "opt-ds") == 0, capsys.readouterr().err
    assert "counting" in capsys.readouterr().out
    command = ["export", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "model")]
    assert run_command(_build(), command, "opt-ds") == 0, capsys.readouterr().err
    from opt_ds.serving.session import Session

    trained, exported = checkpoint.load_model(tmp_path / "run")[0], Session.load(tmp_path / "model")
    head = exported.model.head("counting")
    assert head is not None and torch.equal(head.weight, trained.head("counting").weight)
    assert exported.text(exported.processor(text="a red square")) is not None


def test_it_is_an_ablation_row_and_its_settings_are_checked(store: Path) -> None:
    config = load_config("opt-tiny", [*WITH_TASK])
    assert rows_without(config.tasks)["no-sample-level"] == ("matching", "counting")
    with pytest.raises(UserError, match=r'unknown key "tasks.counting.mots" \(did you mean "most"\?\)'):
        load_config("opt-tiny", [*WITH_TASK, "tasks.counting.mots=3"])
    with pytest.raises(UserError, match=r'unknown key "tasks\.counting"'):
        load_config("opt-tiny", ["tasks.counting.most=3"])


def test_the_other_tasks_samples_are_planned_as_without_it(store: Path) -> None:
    """With no sampling weight it changes no plan."""
    without = load_config("opt-tiny", [*FITTED])
    weights = "tasks.sampling_weights={mlm: 1, mvm: 1, mam: 1, modality: 1, matching: 1}"
    with_it = load_config("opt-tiny", [*FITTED, WITH_TASK[0], weights])
    stores = [FeatureStore(store)]
    old, new = (PretrainingPlan(config, stores).step(3).samples for config in (without, with_it))
    before, after = old.arrays(), new.arrays()
    assert set(after) - set(before) == {"columns/num_regions"}
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("countnig", 'no task "countnig"'),
        ("tests.extending.missing:Task", 'no module "tests.extending.missing"'),
        ("tests.extending.counting:Regions", 'the module has no class "Regions"'),
        ("opt_ds.tasks.mlm:MaskedLanguageModeling", 'there is already a task of the name "mlm"'),
    ],
)
def test_a_task_that_cannot_be_found_is_one_line(named: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_config("opt-tiny", [f"tasks.plugins=[{named}]"])


def test_an_installed_package_announces_tasks_which_run_only_where_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    announced = [EntryPoint("counting", PLUGIN, "opt_ds.tasks")]
    monkeypatch.setattr("opt_ds.registry.entry_points", lambda group: announced if group == "opt_ds.tasks" else [])
    monkeypatch.setattr(TASKS, "_allowed", set())
    assert "counting" not in load_config("opt-tiny").tasks.units
    tree = {"tasks": {"plugins": ["counting"]}}
    assert "counting" in config_from_dict(tree, where="a checkpoint").tasks.units, "installed, so a file may name it"
