"""Arrays of an `.npz` file. Sizes are taken from the array headers before anything is unpacked."""

import zipfile
from collections.abc import Callable
from typing import IO, BinaryIO

import numpy as np
from numpy.lib import format as npy

from opt_ds.decoding.reasons import BrokenFileError, RefusedError, unreadable

#: The arrays that are read. Others, such as the detector's notes, are ignored.
ARRAYS = ("features", "norm_bb", "bbox", "image_w", "image_h", "conf", "soft_labels")
_MOST_MEMBERS = 1000


def load_arrays(file: BinaryIO, allow: Callable[[int], object]) -> dict[str, np.ndarray]:
    """Return the arrays by name. `allow` is called with their total size in bytes, before they are unpacked.

    Raise RefusedError for too many arrays or arrays of Python objects. Raise BrokenFileError for a file that is no
    archive or has damaged members.
    """
    head = file.read(4)
    file.seek(0)
    if head != b"PK\x03\x04":
        raise unreadable("arrays", head + file.read(4096)[4:])
    try:
        with zipfile.ZipFile(file) as archive:
            wanted = {f"{name}.npy" for name in ARRAYS}
            members = [member for member in archive.infolist() if member.filename in wanted]
            if len(members) > _MOST_MEMBERS:
                raise RefusedError(f"it has {len(members)} arrays, {_MOST_MEMBERS} are allowed")
            allow(sum(_unpacked_bytes(archive, member) for member in members))
            return {member.filename.removesuffix(".npy"): _load(archive, member) for member in members}
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise BrokenFileError(f"it is a ZIP archive, damaged ({type(error).__name__})") from None


def _unpacked_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    with archive.open(member) as stream:
        shape, _, dtype = _header(stream, member)
    if dtype.hasobject:
        raise RefusedError(f"its array {member.filename} holds Python objects: only numbers are accepted")
    count = 1
    for size in shape:
        count *= int(size)
    if count < 0 or count * dtype.itemsize > member.file_size:
        raise BrokenFileError(f"its array {member.filename} is declared as {list(shape)}, which the file does not hold")
    return count * dtype.itemsize


def _header(stream: IO[bytes], member: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return read(stream)
    except ValueError:
        raise BrokenFileError(f"its member {member.filename} is not a NumPy array") from None


def _load(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        return npy.read_array(stream, allow_pickle=False)
