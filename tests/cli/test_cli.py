"""The commands' frame: quick help, one line for a mistake, the promised exit codes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from opt_ds.cli import COMMANDS, _build
from opt_ds.cli.program import run_command, run_program
from opt_ds.errors import UserError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "opt_ds", *arguments], capture_output=True, text=True, timeout=60)


def test_help_is_quick_and_lists_every_command() -> None:
    began = time.perf_counter()
    result = run("--help")
    took = time.perf_counter() - began
    assert result.returncode == 0
    assert all(name in result.stdout for name in COMMANDS)
    assert took < 5, "a second or so on a quiet machine"
    code = "import sys; from opt_ds.cli import _build; _build(); print('torch' in sys.modules, 'h5py' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prepar"], 'unknown command "prepar" (did you mean "prepare"?)'),
        (["prepare", "--manifset", "x"], 'no option --manifset (did you mean "--manifest"?)'),
        (["prepare"], "Missing option '--manifest'"),
        (["inspect", "/nonexistent"], "/nonexistent"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], expected: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    assert run_command(_build(), [name, "--help"], "opt-ds") == 0


@pytest.mark.parametrize(
    "command",
    [
        "generate --checkpoint RUN --text a --to text --output",
        "report RUN --output",
        "evaluate captioning --checkpoint RUN --store STORE --output",
        "plan --config none --json",
        "export --checkpoint RUN --output",
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    below = tmp_path / "file" / "below" / "it"
    assert run_command(_build(), [*command.split(), str(below)], "opt-ds") == 2
    assert f"{below}: {tmp_path / 'file'} is not a folder" in capsys.readouterr().err
    if not command.startswith("export"):
        assert run_command(_build(), [*command.split(), str(tmp_path)], "opt-ds") == 2
        assert f"{tmp_path}: exists but is not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "generate --checkpoint RUN --text a --to image --output a.png --seed 99999999999999999999999",
        "generate --checkpoint RUN --text a --to image --output a.png --temperature nan",
        "finetune captioning --checkpoint RUN --store STORE --output NEW --epochs 1e300",
        "finetune captioning --checkpoint RUN --store STORE --output NEW --epochs nan",
        "train-dvae --store STORE --output NEW --seed 9223372036854775808",
        "evaluate image-generation --checkpoint RUN --store STORE --output a.png",
    ],
)
def test_values_that_no_run_can_take_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_build(), command.split(), "opt-ds") == 2
    error = capsys.readouterr().err
    assert command.split()[-2] in error and error.count("\n") == 1


def test_exit_codes_of_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    def program(how: str) -> int:
        if how == "user":
            raise UserError("what, where:\nhow to fix")
        if how == "ours":
            raise AssertionError("ours")
        return 75

    assert run_program(program, ["requeue"], "program") == 75
    assert run_program(program, ["user"], "program") == 2
    assert capsys.readouterr().err == "error: what, where: how to fix\n"
    with pytest.raises(AssertionError):  # a mistake of ours keeps its traceback
        run_program(program, ["ours"], "program")
