"""Match img2dataset's files next to an image with the row of the image.

They are `000000001.json` with url and caption, and `.txt` with the caption.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.importers.files import Files
from opt_ds.ingest.text_files import JsonError, parse_json
from opt_ds.user_files import decode_text

_MOST_KEPT = 100_000  # URLs, to find the offset of the images


@dataclass
class Sidecars:
    """Compares the images' own files with the rows that they were paired with. `checked`: images with such a file."""

    checked: int = 0
    _wrong: int = 0
    _row_of: dict[str, int] = field(default_factory=dict)  # URL or caption -> row
    _named: list[tuple[int, str]] = field(default_factory=list)  # row, and what the file of its image contains instead

    def contradiction(self, files: Files, found: str, row: int, caption: str, url: str) -> str | None:
        """Check whether an image belongs to the row that it was paired with.

        Args:
            files: The folder of the images.
            found: The image, relative to the manifest.
            row: Number of the row.
            caption: Caption of the row.
            url: URL of the row.

        Returns:
            Why the image cannot belong to the row. None if its files agree, or if there are none.
        """
        if len(self._row_of) < _MOST_KEPT:
            self._row_of.update({_plain(url): row, _plain(caption): row})
        named = _url_and_caption(files, found)
        if named is None:
            return None
        self.checked += 1
        path, own_url, own_caption = named
        ours, own = (url, own_url) if own_url is not None else (caption, own_caption)
        if own is None or _plain(own) == _plain(ours):
            return None
        self._wrong += 1
        if len(self._named) < _MOST_KEPT:
            self._named.append((row, _plain(own)))
        return f"its {path.name} names {own[:100]}"

    def check(self, table: Path, first_index: int) -> None:
        """Raise UserError if most images belong to other rows.

        Then the numbers are shifted, and other matches are coincidence.
        """
        if self._wrong < 2 or 2 * self._wrong <= self.checked:
            return
        shifts = Counter(self._row_of[own] - row for row, own in self._named if own in self._row_of)
        shift, count = shifts.most_common(1)[0] if shifts else (0, 0)
        fix = "the images were downloaded with another table, or rows were added or removed"
        if 2 * count > len(self._named):
            fix = f"they are shifted by {shift}: give --first-index {first_index - shift}"
        raise UserError(
            f"{table}: {self._wrong} of {self.checked} images belong to other rows, according to the files next to them: {fix}"
        )


def _url_and_caption(files: Files, found: str) -> tuple[Path, str | None, str | None] | None:
    path = files.sidecar(found, ".json")
    if path is not None:
        content = _read_json(path)
        if isinstance(content, dict):
            url, caption = (value if isinstance(value := content.get(key), str) else None for key in ("url", "caption"))
            if url is not None or caption is not None:
                return path, url, caption
    path = files.sidecar(found, ".txt")
    text = _read(path) if path is not None else None
    return (path, None, text) if path is not None and text is not None else None


def _read_json(path: Path) -> Any:
    text = _read(path)
    try:
        return None if text is None else parse_json(text)
    except JsonError:
        return None


def _read(path: Path) -> str | None:
    try:
        return decode_text(path.read_bytes())
    except (UnicodeDecodeError, OSError):
        return None


def _plain(text: str) -> str:
    """Remove quotes and repeated spaces: img2dataset reads the table with quotes and may strip what it writes."""
    return " ".join(text.replace('"', "").split())
