"""Files that are either whole or absent: atomic writes, flushed to disk, and hashes of files."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError

_LOG = logging.getLogger(__name__)


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that there is no space left; HDF5 tells it in words only."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, on an exception remove it."""
    # Random: processes on several nodes, or in several containers, may have the same number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove temporary files that killed processes left behind for files matching the pattern `names`."""
    for file in folder.glob(f".{names}.*.tmp"):
        file.unlink(missing_ok=True)


@contextmanager
def exclusive_use(path: Path) -> Iterator[None]:
    """Hold `path` (a folder to be written) for this process; wait, and say so, while another one holds it.

    The lock is a file beside `path`, locked by flock: it ends with the process, however that ends. UserError where the file
    system has no locks.
    """
    folder = path.resolve()  # one lock for all names of a folder; "." has no name of its own
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
            # The former holder removed its file: a lock on a removed file excludes nobody.
            if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue
            try:
                yield
            finally:
                lock.unlink()
            return


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. Keys keep their order; the bytes depend on the value alone."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def follow_umask(path: Path) -> None:
    """Give a file the permissions of any that this process makes: safetensors lets its owner alone read what it writes."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # the umask cannot be read without being changed
    probe.touch()
    path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(path: Path) -> str:
    """Return one SHA-256 over the names and contents of the files directly in a folder.

    Hidden files, such as file managers and network mounts leave, are no part of it.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.name.lower() not in ("thumbs.db", "desktop.ini"):
            digest.update(f"{file.name}\0{file_sha256(file)}\0".encode())
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    # Without it a power cut may lose the rename although the file's own bytes are on disk.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
