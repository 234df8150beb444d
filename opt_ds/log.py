"""Where messages go: Python's `logging`, which the commands set up (`to_terminal`) and nothing else does.

Every module logs to `logging.getLogger(__name__)`. A command prints:

- INFO: the text alone, on stdout (on stderr with `extra=ON_STDERR`, for commands whose stdout is their result);
- DEBUG, WARNING and ERROR: on stderr, with the level before the text.

Of several ranks only the first one prints, except errors and records with `extra=EVERY_RANK`, which name their rank. The
variable OPT_DS_LOG_LEVEL (debug, info, warning, error) sets the level. What a command returns (tables, JSON, generated
text) is not logged: it is printed at any level.

A program that imports `opt_ds` configures `logging` itself. Where it does not, Python prints warnings and errors.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from opt_ds.errors import UserError, did_you_mean

LEVEL_VARIABLE = "OPT_DS_LOG_LEVEL"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
#: `extra` of a record that each rank prints for itself.
EVERY_RANK = {"every_rank": True}
#: `extra` of an INFO record of a command whose stdout is its result.
ON_STDERR = {"on_stderr": True}


@contextmanager
def to_terminal(rank: int = 0) -> Iterator[None]:
    """Print what `opt_ds` logs while a command runs; afterwards `logging` is as it was before.

    Raises UserError for an unknown level in OPT_DS_LOG_LEVEL.
    """
    level, logger, handler = _level_of_environment(), logging.getLogger("opt_ds"), _TerminalHandler(rank)
    outer = [other for other in logger.handlers if isinstance(other, _TerminalHandler)]  # of a command that runs this one
    before = logger.level, logger.propagate
    for other in outer:
        logger.removeHandler(other)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False  # a library may have configured the root logger, which would print each line again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for other in outer:
            logger.addHandler(other)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class LineFormatter(logging.Formatter):
    """A record as the user sees it: `text`, `warning: text`, `warning: rank 1: text`, `debug: opt_ds.module: text`."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__("%(message)s")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, with its level and rank where they are shown."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        where = f"{record.name}: " if record.levelno == logging.DEBUG else ""
        rank = f"rank {self._rank}: " if self._rank or getattr(record, "every_rank", False) else ""
        return f"{level}{where}{rank}{super().format(record)}"


class _TerminalHandler(logging.Handler):
    """Prints a rank's records, each flushed at once. A closed pipe or full disk raises OSError, as `print` does."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank
        self.setFormatter(LineFormatter(rank))

    def emit(self, record: logging.LogRecord) -> None:
        if self._rank and record.levelno < logging.ERROR and not getattr(record, "every_rank", False):
            return
        on_stdout = record.levelno == logging.INFO and not getattr(record, "on_stderr", False)
        _print(self.format(record), sys.stdout if on_stdout else sys.stderr)


def _print(text: str, stream: TextIO | None) -> None:
    """Print lines above a progress bar, if there is one; characters that the terminal's encoding lacks are escaped."""
    if stream is None:  # closed before the program began
        return
    encoding = stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    progress_bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if progress_bars is None:
        print(text, file=stream)
    else:
        progress_bars.write(text, file=stream)
    stream.flush()


def _level_of_environment() -> int:
    name = (os.environ.get(LEVEL_VARIABLE) or "info").strip().lower()
    if name not in LEVELS:
        raise UserError(f'{LEVEL_VARIABLE} "{name}": choose {", ".join(LEVELS)}{did_you_mean(name, LEVELS)}')
    return LEVELS[name]
