"""Running of commands and reporting of their errors. The other files hold the functions of the `opt-ds …` commands.

A user's mistake is reported as one line on stderr with exit code 2, never as a traceback.
"""

import errno
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from opt_ds import interrupts, log
from opt_ds.cli.arguments import StoppedError, build, stopped
from opt_ds.cli.arguments import rank_of_environment as rank_of_environment
from opt_ds.errors import RunError, UserError, did_you_mean

EXIT_BAD_INPUT = 2
MAX_SEED = 2**63 - 1
_CLICK_ERROR: Any = typer.BadParameter.__mro__[2]  # click's base class, wherever this version of typer keeps it
_OTHER_RANKS_WAIT_S = 15
_TYPERS_STOPPED = 130
_WRONG_PATH = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_WRONG_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8,}\.tmp")


def run_program(function: Callable[..., Any], arguments: Sequence[str], name: str, rank: int = 0) -> int:
    """Run a function with typer's annotations as a standalone program.

    Args:
        function: The function.
        arguments: Command line arguments.
        name: Name of the program in messages.
        rank: Rank of this process.

    Returns:
        The exit code.
    """
    return run_command(build(function, name), arguments, name, rank)


def run_command(command: Any, arguments: Sequence[str], name: str, rank: int = 0) -> int:
    """Run a click command. Mistakes become one line on stderr and exit code 2.

    With several ranks only rank 0 reports errors. The others wait for it, because a launcher ends all ranks when the
    first one exits. A Ctrl-C becomes one line and exit code 130; SIGTERM becomes 143, and the loss of the terminal
    (SIGHUP) becomes 129. A second signal ends the process at once.

    Args:
        command: The command.
        arguments: Command line arguments.
        name: Name of the program in messages.
        rank: Rank of this process.

    Returns:
        The exit code.
    """
    with interrupts.ended_by_signals():
        return _run(command, arguments, name, rank)


def _run(command: Any, arguments: Sequence[str], name: str, rank: int) -> int:
    try:
        with log.to_terminal(rank):
            result = command.main(list(arguments), prog_name=name, standalone_mode=False)
        if result == _TYPERS_STOPPED:  # typer returns it for a Ctrl-C before the command itself started
            return _stop(stopped(name), rank)
        return result if isinstance(result, int) else 0
    except UserError as error:
        return _fail(str(error), rank)
    except _CLICK_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command: the help is the message
            print(error.format_message(), file=sys.stderr)
            return EXIT_BAD_INPUT
        return _fail(_usage_message(error, name), rank)
    except typer.Exit as exit_request:
        return exit_request.exit_code
    except OSError as error:
        from opt_ds.store.files import is_disk_full

        if is_disk_full(error):
            return _fail(f"the disk is full ({error}): free space, then run the same command again", rank, EXIT_BAD_INPUT)
        if error.filename is None:  # not a file of the user's: a bug, which keeps its traceback
            raise
        code = EXIT_BAD_INPUT if isinstance(error, _WRONG_PATH) or error.errno in _WRONG_NAME else 1
        return _fail(f"{_users_name(error.filename2 or error.filename)}: {error.strerror}", rank, code)
    except StoppedError as stop:
        return _stop(str(stop), rank)
    except (typer.Abort, KeyboardInterrupt):
        return _stop(stopped(name), rank)
    except RunError as error:
        return _fail(str(error), rank, code=1)


def output_file(path: Path | None, param: typer.CallbackParam) -> Path | None:
    """Return the path of an output option.

    Raise UserError, before any work, if it cannot be written. `-` means stdout.
    """
    if path is not None and str(path) != "-":
        check_output(path, param.opts[0])
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{param.opts[0]} {path}: exists but is not a regular file: name a file")
    return path


def finite(value: float | None, param: typer.CallbackParam) -> float | None:
    """Return the value of an option. Raise UserError for infinity and for NaN, which passes any range check."""
    if value is not None and not math.isfinite(value):
        raise UserError(f"{param.opts[0]} {value}: give a finite number")
    return value


def check_output(path: Path, option: str) -> None:
    """Raise UserError if no file or folder of this name can be created.

    That is the case if the nearest existing parent is not a folder or is not writable.
    """
    above = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not above.is_dir():
        raise UserError(f"{option} {path}: {above} is not a folder: name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: no permission to write to {above}: name another place")


def _stop(line: str, rank: int) -> int:
    interrupts.let_signals_end_at_once()
    interrupts.keep_exit_code()
    if not rank:
        print(line, file=sys.stderr, flush=True)
    return interrupts.stopped_exit_code()


def _users_name(path: Any) -> str:
    """Return the final name of a file, given that of its temporary file."""
    found = Path(os.fsdecode(path))
    match = _TEMPORARY.fullmatch(found.name)
    return str(found.with_name(match[1]) if match else found)


def _fail(message: str, rank: int, code: int = EXIT_BAD_INPUT) -> int:
    if rank:
        # If this rank is still running, rank 0 did not end it, so it reports its own error.
        time.sleep(_OTHER_RANKS_WAIT_S)
    where = f"rank {rank}: " if rank else ""
    print(f"error: {where}{' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _usage_message(error: Any, name: str) -> str:
    text = error.format_message().strip().rstrip(".")
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    if context is None:
        return f"{text}: see `{name} --help`"
    if option:
        known = [o for p in context.command.params if not getattr(p, "hidden", False) for o in p.opts]
        text = f"no option {option}{did_you_mean(option, known)}"
    elif text.startswith("No such command") and hasattr(context.command, "list_commands"):
        word = text.split("'")[1]
        text = f'unknown command "{word}"{did_you_mean(word, context.command.list_commands(context))}'
    return f"{text}: see `{context.command_path} --help`"
