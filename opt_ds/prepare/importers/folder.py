"""A plain folder: `name.jpg`, `name.txt` and `name.wav` are one sample `name`. Folders below count as part of the name.

If all samples lie below folders called train, valid, val or test, these are the splits.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from opt_ds.errors import UserError
from opt_ds.prepare.importers.common import report_path, sample, write_import
from opt_ds.prepare.manifest import ManifestLine, Skipped

MANIFEST_NAME = "manifest.jsonl"
_KINDS = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".ppm", ".avif", ".heic", ".jp2"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".opus"),
    "text": (".txt",),
}
_SPLITS = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}


def import_folder(folder: Path, output: Path | None = None, *, say: Callable[[str], None] = print) -> Path:
    """Write the manifest `output` (default: manifest.jsonl in the folder) of the folder's files."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    output = output or folder / MANIFEST_NAME
    found = _files(folder, {output, report_path(output)})
    if not found:
        raise UserError(f"{folder}: no picture, recording or .txt file there")
    tops = {name.split("/")[0] if "/" in name else "" for name in found}
    named = tops <= set(_SPLITS)
    if named:
        say(f"{folder}: the folders {', '.join(sorted(tops))} are the splits")
    start = output.parent.resolve()
    return write_import(output, _entries(folder, found, start, named), say, source=str(folder))


def folder_manifest(folder: Path, *, say: Callable[[str], None] = print) -> Path:
    """Return the folder's manifest.jsonl: the one that is there, or a new one."""
    manifest = folder / MANIFEST_NAME
    if manifest.is_file():
        say(f"{manifest}: found; remove it to have the folder read again")
        return manifest
    return import_folder(folder, say=say)


def _files(folder: Path, ours: set[Path]) -> dict[str, dict[str, list[Path]]]:
    """Return sample name -> kind -> files, in the order of the names."""
    kind_of = {ending: kind for kind, endings in _KINDS.items() for ending in endings}
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.rglob("*")):
        kind = kind_of.get(path.suffix.lower())
        if kind is not None and path.is_file() and path not in ours:
            found[path.relative_to(folder).with_suffix("").as_posix()][kind].append(path)
    return found


def _entries(
    folder: Path, found: dict[str, dict[str, list[Path]]], start: Path, named: bool
) -> Iterator[ManifestLine | Skipped]:
    for name, kinds in found.items():
        twice = next((paths for paths in kinds.values() if len(paths) > 1), None)
        if twice is not None:
            yield Skipped(name, f"two files of one kind: {twice[0].name} and {twice[1].name}")
            continue
        text = None
        if "text" in kinds:
            try:
                text = kinds["text"][0].read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError:
                yield Skipped(name, f"the text is not UTF-8: {kinds['text'][0].name}")
                continue
        files: dict[str, tuple[str, str | None] | None] = {
            kind: (kinds[kind][0].name, os.path.relpath(kinds[kind][0].parent.resolve() / kinds[kind][0].name, start))
            for kind in ("image", "audio")
            if kind in kinds
        }
        yield sample(name, text=text, files=files, split=_SPLITS[name.split("/")[0]] if named else None)
