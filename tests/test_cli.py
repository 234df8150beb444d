"""The commands' frame: quick help, one line for a mistake, the promised exit codes."""

import subprocess
import sys
import time

import pytest

from opt_ds.cli import COMMANDS
from opt_ds.commands import run_program
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
    from opt_ds.cli import _build
    from opt_ds.commands import run_command

    assert run_command(_build(), [name, "--help"], "opt-ds") == 0


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
