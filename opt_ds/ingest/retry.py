"""Samples that an earlier run skipped: detect that their files have changed, and prepare a store to process them again.

The state of the files of skipped samples is recorded as `skipped_files` in report.json: name -> [bytes, hash], null if
missing.
"""

import errno
import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opt_ds.decoding.decoder import DecodingError, own_decoder
from opt_ds.decoding.decoder_process import DIGEST_BYTES
from opt_ds.errors import UserError
from opt_ds.former_names import PREPARATION, current_fields
from opt_ds.ingest.manifest import Manifest
from opt_ds.ingest.report import REPORT_FILE
from opt_ds.ingest.settings import PrepareSettings
from opt_ds.store.schema import STORE_FILE, StoreDescription
from opt_ds.store.writer import StoreWriter, restore_journals

_LOG = logging.getLogger(__name__)
FileState = list[Any] | None
_HASHED_BYTES = 2**30  # for larger files only the size is compared


def file_state(path: Path) -> FileState:
    """Return [bytes, hash] of a file that was not used; None if it does not exist."""
    try:
        size = path.stat().st_size
        if size > _HASHED_BYTES or not path.is_file():
            return [size, ""]
        with open(path, "rb") as file:
            return [size, hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()]
    except (OSError, ValueError) as error:
        missing = isinstance(error, ValueError) or error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
        return None if missing else ["", ""]


def notice_changes(manifest: Manifest, skipped_files: dict[str, FileState]) -> None:
    """Log how many of the skipped files have changed since they were skipped."""
    changed = sorted(name for name, state in skipped_files.items() if file_state(manifest.folder / name) != state)
    if changed:
        verb = "file has" if len(changed) == 1 else "files have"
        _LOG.warning(
            f'{len(changed)} skipped {verb} changed since, such as "{changed[0]}": add --retry-skipped to process them again'
        )


def skipped_files_of_store(output: Path) -> dict[str, FileState]:
    """Return the skipped files of a finished store, with their state at that time."""
    try:
        report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a store without a usable report
        return {}
    return report.get("skipped_files", {})


def skipped_files_of_shards(folder: Path) -> dict[str, FileState]:
    """Return the skipped files of the shards of an unfinished store or a partition, with their state at that time."""
    files: dict[str, FileState] = {}
    for journal in sorted(folder.glob("shard-*.json")):
        files |= json.loads(journal.read_text(encoding="utf-8"))["notes"].get("files", {})
    return files


def forget_skipped(folder: Path) -> int:
    """Drop the shards of an unfinished store or partition that have skipped samples with a file.

    Return their number.
    """
    dropped = 0
    for journal in sorted(folder.glob("shard-*.json")):
        if json.loads(journal.read_text(encoding="utf-8"))["notes"].get("files"):
            journal.unlink()
            dropped += 1
    return dropped


def reopen(output: Path, description: StoreDescription, manifest: Manifest, settings: PrepareSettings) -> int:
    """Make a finished store unfinished, without the shards in which a file was skipped.

    `prepare` then makes these shards. The result is the same store as if the files had been readable at once. A kill at
    any moment leaves the finished store, or an unfinished one that the same command resumes.

    Args:
        output: The store's folder.
        description: The store's description.
        manifest: The manifest that the store was made from.
        settings: The settings that the store was made with.

    Returns:
        The number of shards that were removed.

    Raises:
        UserError: The store was changed since its preparation.
    """
    report = current_fields(json.loads((output / REPORT_FILE).read_text(encoding="utf-8")), PREPARATION)
    files: dict[str, FileState] = report.get("skipped_files", {})
    if not files:
        return 0
    names = [StoreWriter.shard_name(index) for index in range(len(description.shards))]
    if [shard.file for shard in description.shards] != names or description.has_codes:
        raise UserError(
            f"{output}: it was changed after its preparation (opt-ds split, update or train-dvae): "
            "prepare it again into another --output"
        )
    reasons = {entry["id"]: entry["reason"] for entry in report["skipped_samples"]}
    truncated = {kind: set(ids) for kind, ids in report["truncated"].items()}
    kept: dict[int, dict[str, Any]] = {}
    shards = manifest.shards(settings.samples_per_shard)
    for index, lines in enumerate(shards):
        if not any(name in files for line in lines for name in _files_of(manifest, line)):
            kept[index] = _notes(manifest, lines, reasons, truncated)
    restore_journals(output, description, kept)
    (output / STORE_FILE).unlink()
    return len(shards) - len(kept)


def _files_of(manifest: Manifest, line: int) -> Iterable[str]:
    return manifest.lines[line].files().values()


def _notes(
    manifest: Manifest, lines: list[int], reasons: dict[str, str], truncated: dict[str, set[str]]
) -> dict[str, Any]:
    """Reconstruct the notes of a shard without skipped files (see report.py) from the report and the files."""
    skipped, digests = [], {kind: [] for kind in ("text", *manifest.file_kinds)}  # type: ignore[var-annotated]
    own_truncated: dict[str, list[str]] = {kind: [] for kind in truncated}
    seen: set[tuple[str, str]] = set()
    for index in lines:
        line, split = manifest.lines[index], manifest.splits[index]
        if line.id in reasons:
            skipped.append({"id": line.id, "reason": reasons[line.id]})
            continue
        for kind, name in line.files().items():
            if (kind, name) not in seen:
                seen.add((kind, name))
                digests[kind].append([_digest(manifest.folder / name, kind), split, line.id])
        if line.text is not None:
            digests["text"].append([hashlib.blake2b(line.text.encode(), digest_size=DIGEST_BYTES).hexdigest(), split, line.id])
        for kind, ids in truncated.items():
            own_truncated[kind] += [line.id] if line.id in ids else []
    return {"skipped": skipped, "truncated": own_truncated, "digests": digests}


def _digest(path: Path, kind: str) -> str:
    try:
        return own_decoder().digest(path, kind)
    except DecodingError as error:
        raise UserError(f"{path}: {error}, but the store has its features: restore the file, or prepare again") from None
