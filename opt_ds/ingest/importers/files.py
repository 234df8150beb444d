"""Look up the image or audio files of a folder by path or by name without ending, and list those never looked up.

Files are never guessed. If two files match, or one that cannot be decoded here, the lookup returns a `Problem`.
"""

import filecmp
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from opt_ds.decoding.file_kinds import (
    HEAD_BYTES,
    SIDECAR_ENDINGS,
    Kind,
    format_of_name,
    is_clutter,
    is_decodable,
    kind_of_content,
    kind_of_name,
    why_not_decodable,
)
from opt_ds.errors import UserError


@dataclass(frozen=True)
class Problem:
    """Why an existing file is not used. The text up to the first colon is the same for all problems of a kind."""

    reason: str


Found = str | Problem | None
_KINDS: dict[str, tuple[Kind, ...]] = {"image": ("image", "regions"), "audio": ("audio",), "named": ("image", "audio")}


class Files:
    """The files of a folder. `kind` is "image", "audio", or "named" for either.

    Lookups are recorded: `unused` returns the files that were never looked up.
    """

    def __init__(self, folder: Path, manifest: Path, kind: str, *, complete_listing: bool = True) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder: it must hold the {kind} files")
        self.folder, self.kind = folder, kind
        self._start = manifest.parent.resolve()
        self._complete_listing = complete_listing
        self._asked: set[str] = set()  # paths that were looked up
        self._starts: dict[str, str] = {}
        self._listings: dict[str, dict[str, list[str]]] = {}

    def get(self, name: str) -> Found:
        """Return `folder/name` relative to the manifest; None if there is no such file.

        Spaces around a name and the backslashes of a Windows path are changed only if no file has the unchanged name.
        """
        stripped = name.strip()
        for each in dict.fromkeys((name, stripped, stripped.replace("\\", "/"))):
            path = self.folder / each
            try:
                if path.is_file():
                    return self._take(str(path))
            except (OSError, ValueError):  # the name is too long or contains NUL
                return None
        return None

    def get_or_problem(self, name: str, kind: str) -> Found:
        """Look up a file like `get`.

        For a missing file, return a Problem with the name of a file that differs in case or ending.
        """
        found = self.get(name)
        called = self._nearly(name.strip().replace("\\", "/"), kind) if found is None else None
        if called is None:
            return found
        return Problem(f"{kind} file is missing: {name}: it is called {called}")

    def _nearly(self, name: str, kind: str) -> str | None:
        *folders, last = os.path.normpath(name).split("/")
        path = ""
        try:
            for part in folders:
                near = self._listed(path).get(_plain(part), [])
                if part not in near and len(near) != 1:
                    return None
                path = os.path.join(path, part if part in near else near[0])
            stem = _plain(os.path.splitext(last)[0])
            near = [each for each in self._listed(path).get(stem, []) if kind_of_name(each) in _KINDS[kind]]
        except (OSError, ValueError):
            return None
        return os.path.join(path, near[0]) if len(near) == 1 else None

    def _listed(self, folder: str) -> dict[str, list[str]]:
        """Return the files of a subfolder, keyed by name and by name without ending, both case-folded."""
        if folder not in self._listings:
            listing: dict[str, list[str]] = defaultdict(list)
            for name in sorted(os.listdir(self.folder / folder)):
                for key in {_plain(name), _plain(os.path.splitext(name)[0])}:
                    listing[key].append(name)
            self._listings[folder] = dict(listing)
        return self._listings[folder]

    def by_stem(self, stem: str) -> Found:
        """Return the file called `stem`, in any subfolder and with any ending of its kind; None if there is none.

        Files with the same bytes count as one.
        """
        paths = self._stems.get(stem, [])
        known = [path for path in paths if format_of_name(path) is not None] or paths
        for path in paths:
            self._asked.add(os.path.normpath(path))
        if len(known) > 1 and not all(filecmp.cmp(known[0], other, shallow=False) for other in known[1:]):
            first, second = (os.path.relpath(path, self.folder) for path in known[:2])
            return Problem(f"several {self.kind} files have its name: {first} and {second}: keep one in {self.folder}")
        return self._take(known[0]) if known else None

    def sidecar(self, found: str, ending: str) -> Path | None:
        """Return the file next to a file that was found, with the same stem and this ending; None if there is none."""
        path = (self._start / found).with_suffix(ending)
        return path if path.is_file() else None

    def stems(self) -> Iterator[str]:
        """Yield the names without ending of all files of the kind."""
        return iter(self._stems)

    def unused(self) -> list[str]:
        """Return the files of this kind that were never looked up, by path in the folder.

        Without `complete_listing`, only those in a folder with a file that was found.
        """
        paths = self._walk() if self._complete_listing else _beside(self._asked)
        left = (path for path in paths if self._is_of_kind(path) and os.path.normpath(path) not in self._asked)
        return [os.path.relpath(path, self.folder) for path in left]

    @cached_property
    def _stems(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for path in self._walk():
            if self._may_be_of_kind(path):
                found[os.path.splitext(os.path.basename(path))[0]].append(path)
        return dict(found)

    def _walk(self) -> Iterator[str]:
        for folder, folders, names in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not is_clutter(f"{name}/x"))
            yield from (os.path.join(folder, name) for name in sorted(names) if not is_clutter(name))

    def _is_of_kind(self, path: str) -> bool:
        return kind_of_name(path) in _KINDS[self.kind]

    def _may_be_of_kind(self, path: str) -> bool:
        if self._is_of_kind(path):
            return True
        if kind_of_name(path) is not None or path.lower().endswith(SIDECAR_ENDINGS):
            return False
        return _kind_of_file(path) in (None, self.kind)

    def _take(self, path: str) -> str | Problem:
        self._asked.add(os.path.normpath(path))
        found = format_of_name(path)
        if found is not None and not is_decodable(found):
            reason = why_not_decodable(path, _head(path))
            if reason is not None:
                what, _, advice = reason.partition(": ")
                name = os.path.relpath(path, self.folder)
                return Problem(f"{what}: {name}: {advice}")
        folder, name = os.path.split(path)
        if folder not in self._starts:
            self._starts[folder] = os.path.relpath(Path(folder).resolve(), self._start)
        return os.path.normpath(os.path.join(self._starts[folder], name))


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _beside(paths: set[str]) -> Iterator[str]:
    """Yield the files of all folders that contain one of the paths."""
    for folder in sorted({os.path.dirname(path) or "." for path in paths}):
        yield from (os.path.normpath(os.path.join(folder, name)) for name in sorted(os.listdir(folder)))


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _kind_of_file(path: str) -> Kind | None:
    return kind_of_content(_head(path))
