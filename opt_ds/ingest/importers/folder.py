"""A plain folder: `name.jpg`, `name.txt` and `name.wav` are one sample `name`. Subfolders are part of the name.

If all samples are in top-level folders called train, valid (val, validation, dev) or test, these are the splits. A
folder whose layout only resembles that is refused, because test samples could be trained on. The caller decides with
`folder_splits`.
"""

import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_ds.decoding.file_kinds import HEAD_BYTES, is_clutter, kind_of_content, kind_of_name, why_not_decodable
from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import (
    Entry,
    Note,
    Unused,
    report_path,
    sample,
    split_of_name,
    unused_line,
    write_import,
)
from opt_ds.ingest.importers.files import Found
from opt_ds.ingest.importers.metadata_folder import METADATA_NAMES
from opt_ds.ingest.importers.near_names import near_pairs
from opt_ds.ingest.manifest import ManifestLine, Skipped
from opt_ds.ingest.text_files import read_json
from opt_ds.user_files import decode_text

_LOG = logging.getLogger(__name__)
MANIFEST_NAME = "manifest.jsonl"
_KINDS = ("image", "audio", "text")
_OUTSIDE = "outside of the folders that are splits"
_NEAR_SHOWN = 5
_MANY_PAIRS = 10  # with this many pairs, or one pair per ten names, the files were meant to be joined
_ABOUT = re.compile(r"readme|read me|licen[cs]e", re.IGNORECASE)
_ABOUT_AT_TOP = re.compile(
    r"(readme|licen[cs]e)[-_.].*|copying|notice|changelog|changes|authors|contributors|citation|credits|install|about",
    re.IGNORECASE,
)
_NEARLY_SPLIT = re.compile(  # train_images, test-2, LibriSpeech's train-clean-100, but not train_station or test_tube
    r"([a-z]+?)([-_ .]*\d+|[-_ .]+v?\d+[a-z]?"
    r"|[-_ .]+(set|data|dataset|images?|imgs?|pictures?|pics|audio|wavs?|speech|texts?|captions?|files?"
    r"|samples?|parts?|splits?|clean|other|full|small|large|all|raw|new|old|final"
    r"|processed|resized|subset))+",
    re.IGNORECASE,
)

Sample = dict[str, list[Path]]  # kind -> files


@dataclass(frozen=True)
class _Folder:
    """The samples of a folder by name, in the order of the names, and the files that belong to none."""

    samples: dict[str, Sample]
    unused: list[str]


def import_folder(
    folder: Path,
    output: Path | None = None,
    *,
    folder_splits: bool | None = None,
) -> Path:
    """Write the manifest `output` (default: manifest.jsonl in the folder) for the files of a folder.

    `folder_splits`: True takes the splits from the top-level folders train, valid and test, and skips samples outside
    them. False ignores folders. None infers the splits, and raises UserError if they are ambiguous.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    output = output or folder / MANIFEST_NAME
    found = _files(folder, {output, report_path(output)})
    splits = _splits(folder, found.samples, folder_splits)
    found = _without_loose_texts(found) if splits else found
    unused = Unused("files", len(found.unused), tuple(found.unused))
    if not found.samples:
        what = f"; {unused_line(unused)}" if found.unused else ""
        raise UserError(f"{folder}: no image, audio or .txt file there{what}{_other_importer(found.unused)}")
    near = _near_notes(folder, found.samples, splits)
    if splits:
        _LOG.info(f"{folder}: splits from the folders {', '.join(sorted(splits))}")

    def entries() -> Iterator[Entry]:
        yield from _entries(found.samples, output.parent.resolve(), splits)
        if found.unused:
            yield unused
        held = Counter(" and ".join(kind for kind in _KINDS if kind in kinds) for kinds in found.samples.values())
        if any(name.split("/")[-1] in METADATA_NAMES for name in found.unused):
            yield Note(f"metadata of the files was not read: opt-ds import metadata {folder} reads it")
        if len(held) > 1:  # such as a.jpg and a.jpg.txt, which are not one sample
            yield Note("names with " + ", ".join(f"{what}: {count}" for what, count in held.most_common()))
        yield from near

    return write_import(output, entries(), source=str(folder))


def folder_manifest(folder: Path, *, retry_skipped: bool = False) -> Path:
    """Return the folder's manifest.jsonl: the existing one, or a new one.

    With `retry_skipped`, log a warning if samples that were left out of the existing one can be used now. They are not added:
    the tokenizer and the shards of a prepared store depend on all samples.
    """
    manifest = folder / MANIFEST_NAME
    if manifest.is_file():
        _log_found(manifest)
        if retry_skipped:
            _warn_of_usable(folder, manifest)
        return manifest
    return import_folder(folder)


def _log_found(manifest: Path) -> None:
    """Log that an existing manifest is used.

    If an import wrote it, also log what it skipped and which files are newer.
    """
    report = report_path(manifest)
    if not report.is_file():
        _LOG.info(f"{manifest}: found; remove it to have the folder read again")
        return
    skipped = _count_skipped(report)
    left_out = f"; {skipped} samples were left out when it was written, see {report.name}" if skipped else ""
    _LOG.info(f"{manifest}: found; remove it to have the folder read again{left_out}")
    newer = _count_newer(manifest)
    if newer:
        what = "1 file is" if newer == 1 else f"{newer} files are"
        _LOG.info(
            f"note: {what} newer than {manifest.name}, which is used as it is; remove it and the store, or name another "
            "--output, to have the folder read again"
        )


def _warn_of_usable(folder: Path, manifest: Path) -> None:
    """Log how many of the samples that the import left out can be used now."""
    entries = _read_report(report_path(manifest)).get("skipped_samples")
    left_out = {
        entry["id"]
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("id"), str) and entry.get("reason") != _OUTSIDE
    }
    if not left_out:
        return
    found = _files(folder, {manifest, report_path(manifest)}).samples
    named = {name: kinds for name, kinds in found.items() if name in left_out}
    usable = [entry.id for entry in _entries(named, folder.resolve(), {}) if isinstance(entry, ManifestLine)]
    if usable:
        what = "1 sample" if len(usable) == 1 else f"{len(usable)} samples"
        _LOG.warning(
            f'{manifest}: {what} that the import left out can be used now, such as "{usable[0]}": --retry-skipped does not add '
            f"them; remove {manifest.name} and the store, or name another --output, to have the folder read again"
        )


def _count_skipped(report: Path) -> int:
    skipped = _read_report(report).get("skipped")
    return skipped if isinstance(skipped, int) else 0


def _read_report(report: Path) -> dict[str, Any]:
    try:
        content = read_json(report)
    except UserError:
        return {}  # the report is optional, only the manifest is required
    return content if isinstance(content, dict) else {}


def _count_newer(manifest: Path) -> int:
    """Return how many image, audio and text files are newer than the manifest. Stores in the folder do not count."""
    written, newer = manifest.stat().st_mtime_ns, 0
    for folder, folders, names in os.walk(manifest.parent):
        if "store.json" in names:
            folders.clear()
            continue
        for name in names:
            path = Path(folder, name)
            if kind_of_name(name) in _KINDS and not is_clutter(path.relative_to(manifest.parent)) and path.is_file():
                newer += path.stat().st_mtime_ns > written
    return newer


def _files(folder: Path, ours: set[Path]) -> _Folder:
    """Group the folder's files into samples. A text about the folder (README.txt) belongs to none."""
    samples: dict[str, Sample] = defaultdict(lambda: defaultdict(list))
    spelled: dict[str, str] = {}  # composed Unicode -> name of the first file; copies from a Mac may be decomposed
    unused: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path in ours or (path.is_dir() and not path.is_symlink()):
            continue
        name = path.relative_to(folder).as_posix()
        is_unknown = is_clutter(name) or not path.is_file()  # such as a dangling link, or a link to a folder
        kind = None if is_unknown else kind_of_name(path) or _kind_of_content(path)
        if kind in _KINDS:
            stem = path.relative_to(folder).with_suffix("").as_posix()
            samples[spelled.setdefault(unicodedata.normalize("NFC", stem), stem)][str(kind)].append(path)
        else:
            unused.append(name)
    texts = [name for name, kinds in samples.items() if set(kinds) == {"text"}]
    for name in (name for name in texts if _is_about(name)):
        unused.extend(path.relative_to(folder).as_posix() for path in samples.pop(name)["text"])
    return _Folder(dict(samples), sorted(unused))


def _is_about(name: str) -> bool:
    """Return whether a text is about the collection. In subfolders only README and LICENSE are."""
    is_at_top = "/" not in name and _ABOUT_AT_TOP.fullmatch(name) is not None
    return is_at_top or _ABOUT.fullmatch(name.split("/")[-1]) is not None


def _other_importer(unused: list[str]) -> str:
    """Return a hint at the importer of a collection that this folder has the files of; "" if there is none."""
    names = {name.split("/")[-1].lower() for name in unused}
    for importer, matches in (
        ("webdataset", (".tar",)),
        ("hugging-face", ("state.json", "dataset_dict.json", ".parquet", ".arrow")),
        ("kaldi", ("wav.scp",)),
    ):
        if any(name.endswith(matches) for name in names):
            return f": opt-ds import {importer} reads such a folder"
    return ""


def _near_notes(folder: Path, samples: dict[str, Sample], splits: dict[str, str]) -> list[Note]:
    """Return notes on files that resemble one sample but have different names.

    Raise UserError if most files are such pairs. A few pairs among many samples are not an error.
    """
    pairs = near_pairs({name: frozenset(kinds) for name, kinds in samples.items()}, splits)
    if not pairs:
        return []

    def file_of(name: str) -> str:
        return next(iter(samples[name].values()))[0].relative_to(folder).as_posix()

    shown = [f"{file_of(each.first)} and {file_of(each.second)} {each.difference}" for each in pairs[:_NEAR_SHOWN]]
    joined = sum(len(kinds) > 1 for kinds in samples.values())
    are_many = len(pairs) >= _MANY_PAIRS or _MANY_PAIRS * len(pairs) >= len(samples)
    if are_many and 10 * joined < len(pairs):
        raise UserError(
            f"{folder}: {joined} samples have files of two kinds, but {len(pairs)} pairs of files have nearly the same name: "
            f"{shown[0]}: give the files of a sample one name in one folder (a.jpg, a.txt), or list them in a table for "
            "opt-ds import table; if they do not belong together, import images, audio and texts each from a folder "
            "of their own"
        )
    more = f", and {len(pairs) - len(shown)} more pairs" if len(pairs) > len(shown) else ""
    return [Note(f"{'; '.join(shown)}{more}: not paired; give the files of a sample one name in one folder (a.jpg, a.txt)")]


def _kind_of_content(path: Path) -> str | None:
    """Return the kind of a file with an inconclusive ending, by its content."""
    with open(path, "rb") as file:
        return kind_of_content(file.read(HEAD_BYTES))


def _splits(folder: Path, samples: dict[str, Sample], wanted: bool | None) -> dict[str, str]:
    """Return top-level folder -> split; empty if there are no splits.

    Raise UserError for a layout that resembles splits.
    """
    if wanted is False:
        return {}
    tops = Counter(name.split("/")[0] for name in samples if "/" in name)
    splits = {top: split for top in tops if (split := split_of_name(top)) is not None}
    if wanted:
        if not splits:
            raise UserError(
                f"{folder}: no folder called train, valid or test with samples at its top: --folder-splits needs them"
            )
        return splits
    others = {top: count for top, count in tops.items() if top not in splits}
    loose = [name for name, kinds in samples.items() if "/" not in name]
    if splits and all(set(samples[name]) == {"text"} for name in loose) and _has_media(samples):
        loose = []  # classes.txt next to the splits of an image collection is no sample
    fix = (
        f"move them, or choose: opt-ds import folder {folder} --folder-splits leaves them out, --no-folder-splits ignores "
        "folders"
    )
    if splits and (others or loose):
        where = [f"in {top} ({count})" for top, count in sorted(others.items())][:3]
        where += [f"next to them ({len(loose)}, such as {loose[0]})"] if loose else []
        raise UserError(
            f"{folder}: the folders {', '.join(sorted(splits))} look like splits, but samples are outside of them, "
            f"{', '.join(where)}: {fix}"
        )
    if not splits:
        _refuse_hidden_splits(folder, samples)
    return splits


def _refuse_hidden_splits(folder: Path, samples: dict[str, Sample]) -> None:
    """Raise UserError for folders that resemble different splits, but have other names or are not at the top level."""
    parts = {part for name in samples for part in name.split("/")[:-1]}
    near = {part: split for part in parts if (split := split_of_name(part) or _nearly_split(part)) is not None}
    if len(set(near.values())) < 2:
        return
    names = ", ".join(sorted(near)[:6])
    raise UserError(
        f"{folder}: the folders {names} look like splits, but they are not called train, valid and test at its top: "
        "rename or move them, or import the folder that holds them; "
        f"opt-ds import folder {folder} --no-folder-splits ignores folders"
    )


def _nearly_split(name: str) -> str | None:
    match = _NEARLY_SPLIT.fullmatch(name)
    return split_of_name(match[1]) if match else None


def _has_media(samples: dict[str, Sample]) -> bool:
    return any("image" in kinds or "audio" in kinds for kinds in samples.values())


def _without_loose_texts(found: _Folder) -> _Folder:
    loose = {name for name, kinds in found.samples.items() if "/" not in name and set(kinds) == {"text"}}
    names = [path.name for name in loose for path in found.samples[name]["text"]]
    kept = {name: kinds for name, kinds in found.samples.items() if name not in loose}
    return _Folder(kept, sorted([*found.unused, *names]))


def _entries(samples: dict[str, Sample], start: Path, splits: dict[str, str]) -> Iterator[Entry]:
    for name, kinds in samples.items():
        split = splits.get(name.split("/")[0])
        reason = _why_not(kinds)
        if reason is None and splits and split is None:
            reason = _OUTSIDE
        if reason is not None:
            yield Skipped(name, reason)
            continue
        text = None
        if "text" in kinds:
            try:
                text = decode_text(kinds["text"][0].read_bytes()).strip()
            except UnicodeDecodeError:
                yield Skipped(name, f"the text is not UTF-8: {kinds['text'][0].name}")
                continue
        files: dict[str, tuple[str, Found] | None] = {
            kind: (kinds[kind][0].name, os.path.relpath(kinds[kind][0].parent.resolve() / kinds[kind][0].name, start))
            for kind in ("image", "audio")
            if kind in kinds
        }
        yield sample(name, text=text, files=files, split=split)


def _why_not(kinds: Sample) -> str | None:
    """Return why the files of one name are not a sample; None if they are."""
    twice = next((paths for paths in kinds.values() if len(paths) > 1), None)
    if twice is not None:
        return f"two files of one kind: {twice[0].name} and {twice[1].name}"
    for paths in (kinds[kind] for kind in ("image", "audio") if kind in kinds):
        with open(paths[0], "rb") as file:
            reason = why_not_decodable(paths[0], file.read(HEAD_BYTES))
        if reason is not None:
            what, _, advice = reason.partition(": ")
            return f"{what}: {paths[0].name}: {advice}"
    return None
