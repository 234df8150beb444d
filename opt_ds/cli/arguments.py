"""Checks of every option of every command: it is given once, is not empty, and a path in it is possible.

Every command is built by `build`, so that no command has to check this itself.
"""

import inspect
import logging
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
import typer.core

from opt_ds.cli.former_options import with_current_options
from opt_ds.errors import UserError
from opt_ds.log import ON_STDERR

_LOG = logging.getLogger(__name__)
#: Commands that resume when they are called again, which the message after a Ctrl-C mentions.
RESUMING = ("corpus", "prepare", "train-dvae", "train_dvae.py", "finetune", "ablate", "pretrain.py")
#: Options that accept `-` for standard output.
_STDOUT = {("generate", "output"), ("plan", "json_file")}
#: Options of type text that may name a file or a folder: --config also accepts a preset's name.
_PATH_TEXTS = ("store", "config")
#: Options whose text may be empty.
_MAY_BE_EMPTY = ("ignore_words",)
#: Options that name what a command writes.
_OUTPUTS = ("output", "json_file")
_OUTPUTS_OF = (("inspect", "images"),)
_LONGEST_NAME = 255  # bytes; the limit of all Linux file systems
_LONGEST_OUTPUT = _LONGEST_NAME - 32  # a file is first written under a longer, temporary name


class StoppedError(Exception):
    """Ctrl-C, SIGTERM or SIGHUP ended a command. The message is printed."""


class CheckedCommand(typer.core.TyperCommand):
    """A command that rejects a repeated option, an empty value and an impossible path before it runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        types = typing.get_type_hints(inspect.unwrap(self.callback)) if self.callback else {}
        for param in self.params:
            _check_values(self, param, types.get(param.name))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments and reject repeated options."""
        args = with_current_options(self.name, args)
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in self.params:
            if order.count(param) > 1:
                _check_repeated(param, _given(param, args))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Turn a Ctrl-C into StoppedError."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise StoppedError(stopped(ctx.info_name)) from None
        except EOFError as error:  # otherwise typer would treat it as the end of the user's input
            raise RuntimeError(f"a file ends too early: {error}") from error


def build(found: Callable[..., Any] | typer.Typer, name: str) -> Any:
    """Return the click command of a function, or of a group of functions, with the checks of this module."""
    if isinstance(found, typer.Typer):
        found.rich_markup_mode = None
        for info in found.registered_commands:
            info.cls = CheckedCommand
        group = typer.main.get_group(found)
        group.name = name
        return group
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name, cls=CheckedCommand)(found)
    return typer.main.get_command(app)


def rank_of_environment() -> int:
    """Return this process's rank from its launcher's variables, or 0 without a launcher."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def stopped(name: str | None) -> str:
    """Return the line that is printed when a Ctrl-C ends a command."""
    return "stopped: run the same command again to resume" if name in RESUMING else "stopped"


def check_path(text: str, option: str, *, is_output: bool = False) -> str:
    """Return a path with `~` expanded, and "." and ".." replaced by their names.

    Raise UserError if no such path can exist.
    """
    if "\0" in text:
        raise UserError(f"{option}: a path cannot hold a zero byte")
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode(errors="backslashreplace").decode()
        raise UserError(f"{option} {shown}: the name is not UTF-8: rename it") from None
    if text.startswith("~") and not os.path.lexists(text):
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            raise UserError(f"{option} {text}: no such user: write the folder in full")
        text = expanded
    longest = _LONGEST_OUTPUT if is_output else _LONGEST_NAME
    if any(len(part.encode()) > longest for part in Path(text).parts):
        raise UserError(f"{option}: a name in {text[:40]}… has more than {longest} bytes: use a shorter one")
    if Path(text).name in ("", ".."):  # "." has no name, but files are written next to a folder by its name
        text = os.path.abspath(text)
        if is_output and text == os.path.sep:
            raise UserError(f"{option} /: nothing can be written to the root folder itself: name a folder in it")
    return text


def _check_values(command: Any, param: Any, kind: Any) -> None:
    """Check every text and path for a parameter of this type before typer converts it."""
    option = param.opts[0] if param.param_type_name == "option" else param.name.upper()
    is_path = _holds(kind, Path)
    if not (is_path or _holds(kind, str)):
        return
    process = param.process_value
    known = {name for each in command.params for name in (*each.opts, *each.secondary_opts) if name.startswith("--")}

    def checked(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not value.strip() and param.name not in _MAY_BE_EMPTY:
            raise UserError(f"{option} is empty: give a value, or omit the option")
        if value in known:
            raise UserError(f"{option} is followed by {value}, which is an option: give {option} a value")
        return _check_path_of(command, param, value, option) if is_path or param.name in _PATH_TEXTS else value

    def process_checked(ctx: Any, value: Any) -> Any:
        several = isinstance(value, (list, tuple))
        return process(ctx, type(value)(map(checked, value)) if several else checked(value))

    param.process_value = process_checked


def _holds(kind: Any, wanted: type) -> bool:
    """Return whether an annotation is this type, or a list or an optional of it."""
    return kind is wanted or any(_holds(part, wanted) for part in typing.get_args(kind))


def _check_path_of(command: Any, param: Any, value: str, option: str) -> str:
    is_output = param.name in _OUTPUTS or (command.name, param.name) in _OUTPUTS_OF
    if value == "-":
        if (command.name, param.name) in _STDOUT:
            return value
        stream = "does not write to standard output" if is_output else "does not read standard input"
        raise UserError(f"{option} -: this command {stream}: name a file (one that is called - is ./-)")
    return check_path(value, option, is_output=is_output)


def _given(param: Any, args: Sequence[str]) -> list[str]:
    """Return what was given for an option, in order: its values, or a flag's names."""
    found, names = [], (*param.opts, *param.secondary_opts)
    for place, token in enumerate(args):
        name, equals, value = token.partition("=")
        if name not in names:
            continue
        found.append(token if getattr(param, "is_flag", False) else value if equals else args[place + 1])
    return found


def _check_repeated(param: Any, given: list[str]) -> None:
    option = param.opts[0]
    if option == "--set":
        _check_settings(given)
    elif getattr(param, "is_flag", False):
        if len(set(given)) > 1:
            raise UserError(f"{' and '.join(dict.fromkeys(given))} contradict each other: give one of them")
    elif not param.multiple:
        raise UserError(f"{option} is given {_times(len(given))} ({', '.join(given)}): give it once")


def _check_settings(given: list[str]) -> None:
    """Check the keys of repeated --set options.

    If a key is set twice, the last value counts, which job scripts that pass on "$@" rely on; this is logged. Raise
    UserError if a section is set as a whole after one of its keys.
    """
    values: dict[str, list[str]] = {}
    for setting in given:
        key, _, value = setting.partition("=")
        key = key.strip()
        inner = next((before for before in values if before.startswith(f"{key}.")), None)
        if inner is not None:
            raise UserError(f"--set {key} replaces --set {inner}, which comes before it: give one of them, or {key} first")
        values.setdefault(key, []).append(value)
    for key, several in values.items():
        if len(set(several)) > 1:
            overridden = ", ".join(dict.fromkeys(value for value in several if value != several[-1]))
            _LOG.info(f"note: --set {key}={several[-1]} overrides {overridden}, specified before it", extra=ON_STDERR)


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"
