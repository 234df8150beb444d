"""Options as groups: the command line has each field once, the command gets the dataclass; no option that scripts use is lost."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from opt_ds.cli.arguments import build
from opt_ds.cli.dvae import train_dvae
from opt_ds.cli.option_groups import with_option_groups
from opt_ds.cli.program import run_program
from opt_ds.pretrain import pretrain
from tests.cli.test_messages import leaf_commands

#: Every option of every command when groups were introduced: command | names | default. Scripts rely on them; more may come.
_RECORDED = Path(__file__).with_name("options.txt").read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True, kw_only=True)
class Size:
    height: Annotated[int, typer.Option(help="Of the picture.", min=1)]
    width: Annotated[int, typer.Option("--wide", help="Of the picture.", min=1)] = 7


@dataclass(frozen=True, kw_only=True)
class OtherSize(Size):
    width: Annotated[int, typer.Option(help="Of the picture.")] = 9


def test_a_group_is_its_options_on_the_command_line_and_one_object_in_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    got: list[Any] = []

    @with_option_groups
    def paint(*, name: Annotated[str, typer.Argument()], size: Size, loud: bool = False) -> int:
        """Paint a picture."""
        got.append((name, size, loud))
        return 75

    assert run_program(paint, ["cat", "--height", "3"], "paint") == 75
    assert run_program(paint, ["cat", "--wide", "5", "--height", "3", "--loud"], "paint") == 75
    assert got == [("cat", Size(height=3), False), ("cat", Size(height=3, width=5), True)]
    assert run_program(paint, ["cat"], "paint") == 2 and "'--height'" in capsys.readouterr().err
    assert run_program(paint, ["cat", "--height", "0"], "paint") == 2 and "--height" in capsys.readouterr().err
    assert run_program(paint, ["cat", "--height", ""], "paint") == 2 and "--height" in capsys.readouterr().err
    assert run_program(paint, ["cat", "--height", "1", "--height", "2"], "paint") == 2
    assert "--height is given twice" in capsys.readouterr().err
    assert run_program(paint, ["--help"], "paint") == 0
    shown = capsys.readouterr().out
    assert "Paint a picture." in shown
    assert shown.index("--height") < shown.index("--wide") < shown.index("--loud"), "in the order of the signature"


def test_a_group_that_changes_one_option_of_another_keeps_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    got: list[Any] = []

    @with_option_groups
    def paint(*, size: OtherSize) -> None:
        got.append(size)

    assert run_program(paint, ["--height", "3"], "paint") == 0
    assert run_program(paint, ["--height", "3", "--width", "4"], "paint") == 0
    assert got == [OtherSize(height=3, width=9), OtherSize(height=3, width=4)]


def test_two_groups_with_one_option_are_an_error_of_ours() -> None:
    def paint(*, size: Size, width: int) -> None: ...

    with pytest.raises(TypeError, match=r"paint: two groups have the option width"):
        with_option_groups(paint)


def _options() -> Iterator[str]:
    commands = [
        *((f"opt-ds {' '.join(names)}", command) for names, command in leaf_commands()),
        ("pretrain.py", build(pretrain, "pretrain.py")), ("train_dvae.py", build(train_dvae, "train_dvae.py")),
    ]  # fmt: skip
    for name, command in commands:
        for param in command.params:
            default = "required" if param.required else repr(param.default)
            yield f"{name} | {'/'.join([*param.opts, *param.secondary_opts])} | {default}"


def test_no_option_that_scripts_use_is_lost_and_no_default_has_changed() -> None:
    there = set(_options())
    assert [option for option in _RECORDED if option not in there] == []


def test_every_option_has_a_help_text() -> None:
    silent = [
        f"{' '.join(names)} {param.opts[0]}" for names, command in leaf_commands() for param in command.params
        if not param.hidden and not param.help
    ]  # fmt: skip
    assert silent == []
