"""A folder of `.npz` files of image features, one per entry of a database or table, that `opt-ds convert` writes.

Existing files are kept, so a stopped conversion resumes. Entries that cannot be used are counted and logged.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np

from opt_ds.errors import UserError
from opt_ds.ingest.manifest import visible
from opt_ds.store.files import atomic_file

_LOG = logging.getLogger(__name__)
_LONGEST_NAME = 200
_SHOWN = 10


class FeatureFolder:
    """Writes the files. `source` is the database or table, for messages."""

    def __init__(self, source: Path, output: Path) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._source, self._output = source, output
        self._skipped: list[str] = []
        self._renamed: dict[str, str] = {}
        self._written: set[str] = set()

    def write(self, key: str, name: str, load: Callable[[], Mapping[str, Any]]) -> None:
        """Write the arrays that `load` returns. If it raises ValueError, the entry is left out.

        Args:
            key: The entry's key.
            name: The name of its file.
            load: Returns the arrays. It is not called if the file exists already.
        """
        target = self._output / name
        if not target.is_file():
            try:
                arrays = load()
            except ValueError as error:
                self.skip(key, str(error))
                return
            with atomic_file(target) as temporary, open(temporary, "wb") as file:
                np.savez(file, **arrays)
        self._written.add(name)
        if name != plain_name(key):
            self._renamed[key] = name

    def skip(self, key: object, reason: str) -> None:
        """Leave an entry out."""
        self._skipped.append(f"{key}: {reason}")

    def name(self, key: str) -> str:
        """Return a file name for a key that no earlier entry has: its last part, the complete key, or a hash of it."""
        hashed = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        names = (plain_name(key), f"{quote(key, safe='')}.npz", f"{hashed}.npz")
        return next(name for name in names if name not in self._written and is_file_name(name))

    def finish(self, extractor: str) -> int:
        """Log what was written and what was left out, and return the number of files. UserError if there are none.

        `extractor`: the image extractor that reads the files.
        """
        if not self._written:
            first = f"; {self._skipped[0]}" if self._skipped else ""
            raise UserError(f"{self._source}: {'no entry can be used' if self._skipped else 'it is empty'}{first}")
        _LOG.info(
            f"{self._output}: {len(self._written)} files; name them as image in a manifest, and give opt-ds prepare "
            f"--images {extractor}"
        )
        if self._renamed:
            key, name = next(iter(self._renamed.items()))
            count = len(self._renamed)
            _LOG.info(f"  {count} keys differ only by folder or ending, or are too long: they got other names: {key} is {name}")
        if self._skipped:
            _LOG.info(f"  {len(self._skipped)} entries left out")
        for reason in self._skipped[:_SHOWN]:
            _LOG.info(f"  left out {visible(reason)}")
        return len(self._written)


def plain_name(key: str) -> str:
    """Return the last part of a key with the ending .npz."""
    last = PurePosixPath(key).name
    return f"{PurePosixPath(last).stem}.npz"


def is_file_name(name: str) -> bool:
    """Return whether a name can be that of a file."""
    return name != ".npz" and "\0" not in name and len(name.encode()) <= _LONGEST_NAME
