"""Test the environment report: for this machine, and for machines with problems."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from opt_ds.cli.doctor import doctor as doctor_command
from opt_ds.cli.program import run_program
from opt_ds.config import load_config
from opt_ds.pretrain import pretrain
from opt_ds.tools import doctor
from opt_ds.tools.doctor import Finding, Question, examine
from tests.training.runs import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("doctor") / "store")


def find(subject: str, question: Question) -> Finding:
    return next(finding for finding in examine(question) if finding.subject == subject)


def test_the_report_of_this_machine(store: Path, tmp_path: Path) -> None:
    from tests.training.runs import FITTED

    settings = [word for setting in FITTED for word in ("--set", setting)]
    command = [sys.executable, "-m", "opt_ds", "doctor", "--config", "opt-tiny", "--store", store, "--output", tmp_path / "run"]
    done = subprocess.run([*map(str, command), *settings], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ok  ", "warn")) for line in lines)
    for fact in ("torch 2.", "deepspeed 0.19", "apex", "/dev/shm", "layer_norm: ", "MB/s", "GiB free", "fp32 with ZeRO stage 1"):
        assert fact in done.stdout
    assert not (tmp_path / "run").exists(), "it only looks"


def test_it_takes_what_pretraining_takes() -> None:
    """slurm/pretrain.sh passes the same options to both."""
    theirs = set(inspect.signature(pretrain).parameters) - {"local_rank"}  # the launcher's
    assert theirs <= set(inspect.signature(doctor_command).parameters)
    assert run_program(doctor_command, ["--resume", "--help"], "doctor") == 0


def test_a_store_that_is_not_there_or_does_not_fit_fails(store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "opt_ds", "doctor", "--store", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "FAIL  stores" in done.stdout
    finding = find("stores", Question(load_config("opt-base", [f"data.stores=[{store}]"])))
    assert finding.level == "FAIL"
    assert "add --set model.vocab_size=200" in finding.text


def test_what_cannot_run_here_fails_with_the_remedy() -> None:
    finding = find("device", Question(load_config("opt-base", ["precision=fp16"])))
    assert finding.level == "FAIL"
    assert "--set precision=fp32" in finding.text
    finding = find("kernels", Question(load_config("opt-base", ["ops.backend=cudaa"])))
    assert finding.level == "FAIL"


def test_the_impostor_apex_is_told_from_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question(load_config("opt-tiny"))
    assert find("apex", question).text.startswith("not installed")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find("apex", question).level == "warn"
    (tmp_path / "apex" / "normalization").mkdir()
    (tmp_path / "apex" / "normalization" / "fused_layer_norm.py").touch()
    assert find("apex", question) == Finding("ok", "apex", "NVIDIA's")


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def _broken_thing(_: Question):
        raise OSError("libcuda.so:\nno such file")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (_broken_thing, *doctor.CHECKS[-3:-2]))
    findings = list(examine(Question(load_config("opt-tiny"))))
    assert findings[0] == Finding("FAIL", "broken thing", "OSError: libcuda.so: no such file")
    assert findings[1].subject == "store"


def test_a_full_or_forbidden_output_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    finding = find("output", Question(load_config("opt-tiny"), file / "run"))
    assert finding.level == "FAIL"
