"""pretrain.py as people start it: bad input is one line and exit code 2; a finished, a foreign, a stopped run."""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from opt_ds.cli.program import run_program
from opt_ds.pretrain import pretrain
from opt_ds.training import checkpoint
from tests.training.runs import FITTED, free_port, make_store, rank_environment, tiny_config, train
from tests.warm import WarmProcess

SCRIPT = Path(__file__).parents[2] / "opt_ds" / "pretrain.py"


def arguments(store: Path, output: Path, *settings: str) -> list[str]:
    options = [part for setting in (*FITTED, *settings) for part in ("--set", setting)]
    return ["--config", "opt-tiny", "--store", str(store), "--output", str(output), *options]


def start(*given: str, rank: int = 0, world_size: int = 1, port: int = 0) -> WarmProcess:
    return WarmProcess([str(SCRIPT), *given], rank_environment(rank, world_size, port), cwd="/")


def _edit_description(path: Path, **changes: Any) -> None:
    description = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps(description | changes))


def _write_nan(path: Path) -> None:
    with h5py.File(path / "shard-00000.h5", "r+") as shard:
        shard["audio/features"][3, 2] = np.nan


def _cut_off(path: Path) -> None:
    with open(path / "shard-00000.h5", "r+b") as shard:
        shard.truncate(5000)


BROKEN_STORES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "no feature store there"),
    "of another schema": (lambda p: _edit_description(p, schema_version=99), "schema version 99"),
    "with NaN": (_write_nan, "shard-00000.h5"),
    "cut off": (_cut_off, "shard is truncated"),
}


@pytest.mark.parametrize("name", BROKEN_STORES)
def test_a_broken_store_is_refused_by_name(
    name: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, expected = BROKEN_STORES[name]
    broken = Path(shutil.copytree(store, tmp_path / "broken"))
    (broken / "verified.json").unlink(missing_ok=True)
    damage(broken)
    assert run_program(pretrain, arguments(broken, tmp_path / "run"), "pretrain.py") == 2
    error = capsys.readouterr().err
    assert str(broken) in error and expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists(), "nothing is written before the checks"


def test_a_store_that_does_not_fit_names_the_settings_that_mend_it(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", "opt-tiny", "--store", str(store), "--output", str(tmp_path / "run")]
    for key in ("vocab_size", "image_feature_dim", "image_num_classes", "audio_feature_dim", "image_codebook_size"):
        given += ["--set", f"model.{key}=9"]  # unspecified ones are the store's
    assert run_program(pretrain, given, "pretrain.py") == 2
    error = capsys.readouterr().err
    for setting in ("vocab_size=200", "image_feature_dim=32", "image_num_classes=50", "audio_feature_dim=20",
                    "image_codebook_size=64"):  # fmt: skip
        assert f"--set model.{setting}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["data.valid_split=vaild"], 'no split "vaild" (did you mean "valid"?)'),
        (["precision=fp16"], "does not run on the CPU"),
        (["deepspeed_config=/nonexistent.json"], "deepspeed_config /nonexistent.json: no such file"),
        (["batch.siez=1"], 'did you mean "size"'),
        ([f"tasks.{task}.weight=0" for task in ("mlm", "mvm", "mam", "modality", "matching")], "no task is enabled"),
    ],
)
def test_bad_settings_end_with_one_line(
    settings: list[str], expected: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(pretrain, arguments(store, tmp_path / "run", *settings), "pretrain.py") == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_a_taken_port_is_one_line(store: Path, tmp_path: Path) -> None:
    with socket.socket() as other_run:
        other_run.bind(("", 0))
        other_run.listen()
        port = other_run.getsockname()[1]
        process = start(*arguments(store, tmp_path / "run"), rank=0, world_size=2, port=port)
        error = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert f"port {port} is taken" in error and "Traceback" not in error


def test_an_output_directory_of_another_run_is_refused_and_a_finished_one_said(
    store: Path, tmp_path: Path, group: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    train(tiny_config(store, "train.max_steps=1"), output, group)
    capsys.readouterr()
    for setting, expected in (("seed=2", "seed was 1 there and is 2 now"), ("tasks.mam.span=5", "tasks.mam.span")):
        assert run_program(pretrain, arguments(store, output, setting), "pretrain.py") == 2
        error = capsys.readouterr().err
        assert f"{output} holds another run" in error and expected in error and error.count("\n") == 1
    other = make_store(tmp_path / "other", 50)
    assert run_program(pretrain, arguments(other, output), "pretrain.py") == 2
    assert "stores' contents differ" in capsys.readouterr().err
    harmless = ("train.max_steps=1", "batch.max_tokens=3000", "zero.stage=2", "train.log_every=7")
    assert run_program(pretrain, arguments(store, output, *harmless), "pretrain.py") == 0
    assert "is finished (step-00000001)" in capsys.readouterr().out


def test_a_step_plan_of_another_version_is_not_continued(
    store: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from opt_ds.data.pretraining_plan import PretrainingPlan

    train(tiny_config(store, "train.max_steps=1"), tmp_path / "run", group)
    monkeypatch.setattr(PretrainingPlan, "VERSIONS", (99,))
    monkeypatch.setattr(PretrainingPlan, "VERSION", 99)
    assert run_program(pretrain, arguments(store, tmp_path / "run"), "pretrain.py") == 2
    assert "version 99" in capsys.readouterr().err


def test_of_several_ranks_one_speaks() -> None:
    port = free_port()
    ranks = [start("--config", "op-tiny", rank=rank, world_size=2, port=port) for rank in range(2)]
    _, error = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 2
    assert 'did you mean "opt-tiny"' in error and error.count("\n") == 1
    assert ranks[1].poll() is None, "a launcher ends the others at the first exit: rank 0's line must be out by then"
    ranks[1].kill()
    assert ranks[1].communicate()[1] == ""


def test_sigterm_saves_and_asks_to_be_requeued_and_sigkill_loses_nothing(
    store: Path, tmp_path: Path, group: Any
) -> None:
    settings = ("checkpoint.every_steps=3", "schedule.total_steps=200")
    output = tmp_path / "run"
    long = arguments(store, output, *settings, "train.max_steps=200")
    run = start(*long)
    _wait_for(output / "checkpoints" / "step-00000003", run)
    run.send_signal(signal.SIGTERM)
    out, error = run.communicate(timeout=120)
    assert run.returncode == 75, error
    stopped = checkpoint.find_resumable(output)
    assert stopped is not None and f"SIGTERM: saved after step {int(stopped.name[5:])};" in out

    following = int(stopped.name[5:]) // 3 * 3 + 3
    run = start(*long)
    _wait_for(output / "checkpoints" / f"step-{following:08d}", run)
    os.kill(run.pid, signal.SIGKILL)
    out, _ = run.communicate()
    assert f"resuming from {stopped}, after step {int(stopped.name[5:])} of 200" in out

    last = following + 6
    config = tiny_config(store, *settings, f"train.max_steps={last}")
    train(config, output, group)
    train(config, tmp_path / "straight", group)
    names = ("model.safetensors", "moments.safetensors")
    for name in names:
        folder = Path("checkpoints") / f"step-{last:08d}"
        assert (output / folder / name).read_bytes() == (tmp_path / "straight" / folder / name).read_bytes()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, last + 1)), "each step once"


def _wait_for(path: Path, run: WarmProcess, timeout_s: float = 120) -> None:
    began = time.monotonic()
    while not (path / "COMPLETE.json").exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() - began < timeout_s, f"no {path}"
        time.sleep(0.02)
