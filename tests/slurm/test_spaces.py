"""The job scripts where paths have spaces: the checkout's, the interpreter's and the arguments'. Small programs stand in for
Slurm's commands; the last test submits to a real Slurm."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.local_cluster import LocalCluster

SCRIPTS = Path(__file__).parents[2] / "slurm"
ARGUMENTS = ["--store", "/data/my store", "--output", "/data/my  runs/base one", "--set", "Command=x WorkDir=y"]


@pytest.fixture
def checkout(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A checkout with the job scripts and an interpreter that writes down its arguments, one line per call."""
    folder = tmp_path / getattr(request, "param", "my  own (opt ds) checkout")
    shutil.copytree(SCRIPTS, folder / "slurm")
    (folder / "opt_ds").mkdir()
    (folder / "opt_ds" / "pretrain.py").touch()
    calls = shlex.quote(str(tmp_path / "calls"))
    _program(
        folder / "a python",
        f'printf "%s\\t" "$@" >> {calls}\necho >> {calls}\n'
        '[[ " $* " == *" --arguments"* ]] && printf "%s\\n" --output "/data/a run"\n'
        '[[ " $* " == *" --list"* ]] && echo whole\nexit 0',
    )
    return folder


def _program(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def _calls(tmp_path: Path) -> list[list[str]]:
    return [line.split("\t")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]


def _run_as_job(
    tmp_path: Path, checkout: Path, script: str, *arguments: str, command: str | None = None, **more: str
) -> list[list[str]]:
    """Run a copy of the script like slurmd and return the calls of the interpreter."""
    tools = tmp_path / "tools"
    tools.mkdir()
    command = f"{checkout}/slurm/{script} {' '.join(arguments)}" if command is None else command
    shown = f"JobId=7 JobName=opt_ds UserId=me(1) Command={command} WorkDir={tmp_path} Power= NtasksPerTRES:0"
    _program(tools / "scontrol", f'[[ $2 == job ]] && echo {shlex.quote(shown)} || echo "node NodeAddr=10.0.0.1 Version=1"')
    _program(tools / "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    _program(tools / "squeue", "echo 2030-01-01T00:00:00")
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    shutil.copy(checkout / "slurm" / script, copy)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OPT_DS_HOME"))}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "OPT_DS_PYTHON": str(checkout / "a python"), "SLURM_JOB_ID": "7",
                    "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_ARRAY_TASK_ID": "0",
                    "SLURM_ARRAY_TASK_COUNT": "2", **more}  # fmt: skip
    done = subprocess.run(["bash", copy, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return _calls(tmp_path)


@pytest.mark.parametrize("checkout", ["plain", "with a space", "two  spaces and = (brackets) 'quotes'"], indirect=True)
@pytest.mark.parametrize(
    ("script", "calls"),
    [
        ("pretrain.sh", [["-m", "opt_ds", "doctor", *ARGUMENTS], ["{home}/opt_ds/pretrain.py", *ARGUMENTS]]),
        ("evaluate.sh", [["-m", "opt_ds", "evaluate", *ARGUMENTS]]),
        ("prepare.sh", [["-m", "opt_ds", "prepare", "--partition", "0/2", "--workers", "1", *ARGUMENTS]]),
        ("ablate.sh", [
            ["-m", "opt_ds", "ablate", *ARGUMENTS, "--task", "0", "--list"],
            ["-m", "opt_ds", "ablate", *ARGUMENTS, "--task", "0", "--arguments"],
            ["{home}/opt_ds/pretrain.py", "--output", "/data/a run"],
            ["-m", "opt_ds", "ablate", *ARGUMENTS, "--task", "0", "--num-ranks", "1"],
        ]),
    ],
)  # fmt: skip
def test_every_script_finds_its_checkout_and_passes_its_arguments(
    tmp_path: Path, checkout: Path, script: str, calls: list[list[str]]
) -> None:
    expected = [[word.format(home=checkout) for word in call] for call in calls]
    assert _run_as_job(tmp_path, checkout, script, *ARGUMENTS) == expected


def test_the_beginning_of_a_path_may_itself_be_a_file(tmp_path: Path, checkout: Path) -> None:
    """A file whose path is the checkout's up to a space is not taken for the script."""
    (tmp_path / "my").touch()
    assert _run_as_job(tmp_path, checkout, "evaluate.sh", "summary") == [["-m", "opt_ds", "evaluate", "summary"]]


def test_a_checkout_that_is_named_is_taken(tmp_path: Path, checkout: Path) -> None:
    calls = _run_as_job(tmp_path, checkout, "evaluate.sh", "summary", command="/elsewhere/x.sh", OPT_DS_HOME=str(checkout))
    assert calls == [["-m", "opt_ds", "evaluate", "summary"]]


def test_a_script_of_no_checkout_is_one_line(tmp_path: Path, checkout: Path) -> None:
    with pytest.raises(AssertionError, match=r"^error: no opt_ds in /some: set OPT_DS_HOME to the checkout\n"):
        _run_as_job(tmp_path, checkout, "evaluate.sh", "summary", command="/some/where/x.sh summary")


@pytest.mark.parametrize(("options", "words"), [
    ("", []), ("--nodes=2  --qos=low", ["--nodes=2", "--qos=low"]),
    ("--output='/a b/%j.log' -N 2", ["--output=/a b/%j.log", "-N", "2"]),
])  # fmt: skip
def test_the_ablation_submits_itself_with_options_that_have_spaces(
    tmp_path: Path, checkout: Path, options: str, words: list[str]
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    _program(tools / "sbatch", f'printf "%s\\n" "$@" > {shlex.quote(str(tmp_path / "sbatch"))}; echo 5')
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OPT_DS_HOME"))}
    python = str(checkout / "a python")
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "OPT_DS_PYTHON": python, "SBATCH_OPTIONS": options}
    script = checkout / "slurm" / "ablate.sh"
    subprocess.run([script, *ARGUMENTS], env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "sbatch").read_text().splitlines() == ["--parsable", *words, "--array=0-0", str(script), *ARGUMENTS]


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_slurm_itself_shows_the_path_as_the_scripts_expect(cluster: LocalCluster, tmp_path: Path, checkout: Path) -> None:
    environment = cluster.environment | {"OPT_DS_PYTHON": str(checkout / "a python")}
    submit = ["sbatch", "--parsable", f"--output={tmp_path}/job.log", checkout / "slurm" / "evaluate.sh", *ARGUMENTS]
    job = subprocess.run(submit, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    cluster.wait(lambda: cluster.run("squeue", "--noheader", f"--jobs={job}", check=False) == "", 120, "the job does not end")
    assert _calls(tmp_path) == [["-m", "opt_ds", "evaluate", *ARGUMENTS]], (tmp_path / "job.log").read_text()
