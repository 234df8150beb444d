"""Files named by patterns: `train=shards/{00000..00099}.tar`, `shards/*.tar`, or a folder of them.

Braces mean what they mean in a shell and in WebDataset: `{a,b}` and `{08..12}`, with leading zeros. Every file that they
name must exist, while `*` names the files that do.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import split_and_file

_MOST_FILES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?[0-9]{1,9})\.\.(-?[0-9]{1,9})(?:\.\.(-?[0-9]{1,9}))?")
_REMOTE = re.compile(r"([a-z][a-z0-9+.-]*:)//|pipe:", re.IGNORECASE)
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Shard:
    """A file of a data set. `name` is its path, without ending, in the folder that contains all files of the data set."""

    path: Path
    name: str
    split: str | None = None


def find_shards(arguments: Sequence[str], endings: tuple[str, ...]) -> list[Shard]:
    """Return the files that arguments of the form [SPLIT=]PATTERN name, each pattern's in order.

    Args:
        arguments: Patterns: a file, a folder, or a name with braces, `*`, `?` or `[]`.
        endings: What the names of the files in a folder end with.

    Raises:
        UserError: A pattern names no file, a missing one or a remote one, or a file is named twice.
    """
    found: list[tuple[str | None, Path]] = []
    for argument in arguments:
        split, pattern = split_and_file(argument)
        found += [(split, path) for path in _files(str(pattern), argument, endings)]
    seen: set[str] = set()
    for _, path in found:
        real = os.path.realpath(path)
        if real in seen:
            raise UserError(f"{path}: it is named twice: name each file once")
        seen.add(real)
    names = shard_names([path for _, path in found])
    return [Shard(path, name, split) for (split, path), name in zip(found, names, strict=True)]


def shard_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file: its path, without ending, in the folder that contains all of them."""
    if not paths:
        return []
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [os.path.splitext(os.path.relpath(os.path.abspath(path), top))[0] for path in paths]


def named_together(arguments: Sequence[str]) -> str:
    """Return a short name of all arguments, for messages."""
    return arguments[0] if len(arguments) == 1 else f"{arguments[0]} and {len(arguments) - 1} more"


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern with braces stands for. Raise UserError for more than a million."""
    names = [pattern]
    while any(_BRACES.search(name) for name in names):
        names = list(dict.fromkeys(name for each in names for name in _expand_first(each)))
        if len(names) > _MOST_FILES:
            raise _too_many(pattern)
    return [name.replace("\0", "{").replace("\1", "}") for name in names]


def _expand_first(name: str) -> Iterator[str]:
    match = _BRACES.search(name)
    if match is None:
        yield name
        return
    before, inner, after = name[: match.start()], match[1], name[match.end() :]
    span = _RANGE.fullmatch(inner)
    if span is not None:
        yield from (before + number + after for number in _numbers(span, name))
    elif "," in inner:
        yield from (before + part + after for part in inner.split(","))
    else:  # as in a shell, braces around a single name are part of it
        yield f"{before}\0{inner}\1{after}"


def _numbers(span: re.Match[str], name: str) -> Iterator[str]:
    first, last, step = int(span[1]), int(span[2]), abs(int(span[3] or 1)) or 1
    if abs(last - first) // step >= _MOST_FILES:
        raise _too_many(name)
    digits = [text.removeprefix("-") for text in (span[1], span[2])]
    width = max(len(span[1]), len(span[2])) if any(len(text) > 1 and text[0] == "0" for text in digits) else 0
    direction = 1 if last >= first else -1
    yield from (f"{number:0{width}d}" for number in range(first, last + direction, direction * step))


def _too_many(pattern: str) -> UserError:
    return UserError(f"{pattern}: its braces stand for more than {_MOST_FILES:,} names: name fewer")


def _files(pattern: str, argument: str, endings: tuple[str, ...]) -> list[Path]:
    # Path() has removed a slash of "https://", so the argument itself is checked.
    if any(map(_REMOTE.match, (argument, argument.partition("=")[2]))):
        raise UserError(f"{argument}: not a local file: nothing is downloaded here: download it, and name the local files")
    if os.path.isdir(pattern):
        names = sorted(name for name in os.listdir(pattern) if name.lower().endswith(endings) and not name.startswith("."))
        if not names:
            raise UserError(f"{pattern}: no file there is called {' or '.join(f'*{ending}' for ending in endings)}")
        return [Path(pattern, name) for name in names]
    if os.path.lexists(pattern):
        return [Path(pattern)]
    names = expand_braces(pattern)
    found: list[str] = []
    missing: list[str] = []
    for name in names:
        matches = sorted(glob.glob(name)) if _GLOB.search(name) else [name] if os.path.lexists(name) else []
        found += matches
        missing += [] if matches else [name]
    if missing:
        which = f", as {len(missing)} of the {len(names)} that {pattern} names" if len(names) > 1 else ""
        raise UserError(f"{missing[0]}: no such file{which}")
    return [Path(name) for name in found]
