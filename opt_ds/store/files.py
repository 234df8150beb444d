"""Atomic, durable file writes, locks, and hashes of files."""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError

_LOG = logging.getLogger(__name__)
_ABANDONED_S = 86_400
_LINE_SEPARATORS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # str.splitlines splits at them


def is_disk_full(error: OSError) -> bool:
    """Return whether an error means that there is no space left. HDF5 reports this in the message only."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`.

    On success, sync the file and rename it to `path`; on an exception, remove it.
    """
    # The name is random, because processes on several nodes or in several containers may have the same PID.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, which does not exist yet.

    On success, it replaces `path`; on an exception, remove it. Several processes may do so at the same time: the last one
    determines the content. Leftovers of processes that were killed more than a day ago are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if leftover.is_dir() and time.time() - leftover.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(leftover, ignore_errors=True)
    temporary, previous = (path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp") for _ in range(2))
    try:
        yield temporary
        while True:
            try:
                temporary.rename(path)  # replaces an empty folder
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            with suppress(FileNotFoundError):  # another process may have moved it
                path.rename(previous)
            shutil.rmtree(previous, ignore_errors=True)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove temporary files left by killed processes, for files that match the pattern `names`."""
    for file in folder.glob(f".{names}.*.tmp"):
        file.unlink(missing_ok=True)


@contextmanager
def exclusive_use(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, a folder to be written.

    Wait, with a log message, while another process holds it. The lock is a file next to `path`, locked by flock, so it
    ends with the process in every case. Raise UserError if the file system does not support locks.
    """
    folder = path.resolve()  # one lock for all names of a folder, and a name for "."
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    while True:
        with open(lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _LOG.info(f"{path}: another process is writing it: waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                lock.unlink(missing_ok=True)
                raise UserError(
                    f"{folder.parent}: its file system has no file locks ({error.strerror}): mount it with locks, or use another"
                ) from None
            # The previous holder removed its lock file. A lock on a removed file does not exclude others.
            if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue
            try:
                yield
            finally:
                lock.unlink()
            return


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. Keys keep their order, and the bytes depend on the value only."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one line of JSON per row, atomically. Line separators within texts are escaped, so that a line is a row."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            text = json.dumps(row, ensure_ascii=False)
            file.write(text.translate(_LINE_SEPARATORS) + "\n")


def follow_umask(path: Path) -> None:
    """Set the permissions of a file to those of a new file of this process.

    safetensors makes its files private to the owner.
    """
    probe = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # reading the umask would require changing it
    probe.touch()
    path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(path: Path) -> str:
    """Return one SHA-256 over the names and contents of the files directly in a folder.

    Hidden files, such as those that file managers and network mounts leave, are ignored.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.name.lower() not in ("thumbs.db", "desktop.ini"):
            digest.update(f"{file.name}\0{file_sha256(file)}\0".encode())
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Sync a folder to disk.

    Without it a power failure may undo a rename although the content of the file is on disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
