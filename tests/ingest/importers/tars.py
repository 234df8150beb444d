"""Tar files in the forms that collections are published in."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

JPEG = b"\xff\xd8\xff\xe0 a picture of "


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT, **fields: Any) -> Path:
    """Write regular members, in order; the same name may occur twice. `fields` are set on each of them, such as `type`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            add_member(tar, name, content, **fields)
    return path


def add_member(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
