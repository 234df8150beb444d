"""Image and audio files inside a Parquet table, which are written to files so that a manifest can name them.

Hugging Face `datasets` stores a cell of its Image and Audio features as {"bytes": …, "path": …}. With bytes it is the
file itself, without them a path. A plain binary column is treated as files too.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from opt_ds.decoding.file_kinds import HEAD_BYTES, endings_of, why_not_decodable
from opt_ds.ingest.importers.files import Problem
from opt_ds.store.files import atomic_file

_DIGEST_BYTES = 16
_DRAWING = ".svg"  # independent of the name in the table


def is_embedded(value: Any) -> bool:
    """Return whether a cell contains a file as Hugging Face stores it (either key may be null), or plain bytes."""
    return isinstance(value, bytes) or (isinstance(value, dict) and bool(value) and value.keys() <= {"bytes", "path"})


class EmbeddedFiles:
    """Writes files into a folder next to the manifest, named by a hash of their bytes.

    Names from the table therefore never become paths, equal files are written once, and a second import writes nothing.
    """

    def __init__(self, manifest: Path) -> None:
        self.folder = manifest.with_name(f"{manifest.stem}-files")
        self._start = manifest.parent

    def take(self, value: Any) -> str | Problem | None:
        """Return where the bytes of a cell were written, relative to the manifest; None if it has no bytes.

        Return a Problem for a format that cannot be decoded here.
        """
        data = value if isinstance(value, bytes) else value.get("bytes")
        if not data:
            return None
        reason = why_not_decodable(path_of(value) or "", data[:HEAD_BYTES])
        if reason is not None:
            return Problem(reason)
        name = hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest() + _ending(data, path_of(value))
        target = self.folder / name
        if not target.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as temporary:
                temporary.write_bytes(data)
        return os.path.relpath(target, self._start)


def path_of(value: Any) -> str | None:
    """Return the path that a cell contains."""
    return (value.get("path") or None) if isinstance(value, dict) else None


def _ending(data: bytes, path: str | None) -> str:
    if data.lstrip()[:5].lower() in (b"<svg ", b"<svg>", b"<?xml"):
        return _DRAWING
    ending = os.path.splitext(path or "")[1].lower()
    return ending if ending in endings_of("image", "audio", decodable=True) else ""
