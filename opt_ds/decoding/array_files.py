"""Arrays of numbers in `.npz`, `.npy`, safetensors and HDF5 files. The format is recognised by content.

Sizes are taken from the headers before anything is unpacked. Nothing in a file can run code: arrays of Python objects are
refused, and so are HDF5 datasets that lie outside their file.
"""

import json
import lzma
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import IO, Any, BinaryIO

import h5py
import numpy as np
from numpy.lib import format as npy

from opt_ds.decoding.reasons import BrokenFileError, RefusedError, unreadable
from opt_ds.store.hdf5 import dataset_problem

FEATURES = "features"
#: The arrays that are read. Others, such as the detector's notes, are ignored.
ARRAYS = (
    FEATURES, "norm_bb", "bbox", "image_w", "image_h", "conf", "soft_labels",  # UNITER
    "x",  # bottom-up-attention.pytorch
    "boxes", "scores", "labels",
)  # fmt: skip
_MOST_MEMBERS = 1000
_LONGEST_HEADER = 2**20  # bytes of JSON in a safetensors file
_HDF5, _NPY, _ZIP = b"\x89HDF\r\n\x1a\n", b"\x93NUMPY", b"PK\x03\x04"
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip
#: Errors of a damaged ZIP archive or of an array in it. An encrypted member is a RuntimeError.
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError, OSError, ValueError,
)  # fmt: skip
Allow = Callable[[int], object]
Arrays = dict[str, np.ndarray]


def load_arrays(file: BinaryIO, allow: Allow) -> Arrays:
    """Return the arrays of `ARRAYS` by name. The only array of a file is its features, whatever its name.

    Args:
        file: The file.
        allow: Called with the total size of the arrays in bytes, before they are unpacked.

    Raises:
        RefusedError: There are too many arrays, or arrays of Python objects.
        BrokenFileError: The file has another format, or is damaged.
    """
    head = file.read(9)
    file.seek(0)
    if head.startswith(_ZIP):
        return _of_npz(file, allow)
    if head.startswith(_NPY):
        return _of_npy(file, allow)
    if head.startswith(_HDF5):
        return _of_hdf5(file, allow)
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return _of_safetensors(file, allow)
    raise unreadable("arrays", head + file.read(4096)[9:])


def _wanted(names: list[str]) -> dict[str, str]:
    """Return the names that are read, by their names in the result."""
    if len(names) == 1 and names[0] not in ARRAYS:
        return {FEATURES: names[0]}
    return {name: name for name in names if name in ARRAYS}


def _of_npz(file: BinaryIO, allow: Allow) -> Arrays:
    try:
        with zipfile.ZipFile(file) as archive:
            members = npz_members(archive)
            wanted = {name: members[own] for name, own in _wanted(list(members)).items()}
            allow(sum(_unpacked_bytes(archive, member) for member in wanted.values()))
            return {name: _load(archive, member) for name, member in wanted.items()}
    except (RefusedError, BrokenFileError):
        raise
    except _ZIP_ERRORS as error:
        raise BrokenFileError(f"it is a ZIP archive, damaged ({type(error).__name__})") from None


def npz_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members of an `.npz` file by the names of their arrays. Raise BrokenFileError if two have one name."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if members.setdefault(name, member) is not member:
            raise BrokenFileError(f"two of its members are named {name[:40]}: save it again")
    return members


def load_npz_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, allow: Allow) -> np.ndarray:
    """Return one array of an `.npz` file.

    Args:
        archive: The file.
        member: The member that holds the array.
        allow: Called with the size of the array in bytes, before it is unpacked.

    Raises:
        RefusedError: It is an array of Python objects, or `allow` refuses it.
        BrokenFileError: It is not an array, or damaged.
    """
    try:
        allow(_unpacked_bytes(archive, member))
        return _load(archive, member)
    except (RefusedError, BrokenFileError):
        raise
    except _ZIP_ERRORS:
        raise BrokenFileError(f"its member {member.filename} is damaged") from None


def _unpacked_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    with archive.open(member) as stream:
        return _declared_bytes(stream, member.filename, member.file_size)


def _declared_bytes(stream: IO[bytes], name: str, held: int) -> int:
    """Return the bytes of the array that a header of NumPy declares. `held` is the size of what follows, or more."""
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError:
        raise BrokenFileError(f"its member {name} is not a NumPy array") from None
    if dtype.hasobject:
        raise RefusedError(f"its array {name} holds Python objects: only numbers are accepted")
    count = 1
    for size in shape:
        count *= int(size)
    if count < 0 or count * dtype.itemsize > held:
        raise BrokenFileError(f"its array {name} is declared as {list(shape)}, which the file does not hold")
    return count * dtype.itemsize


def _load(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        return npy.read_array(stream, allow_pickle=False)


def _of_npy(file: BinaryIO, allow: Allow) -> Arrays:
    size = file.seek(0, 2)
    file.seek(0)
    allow(_declared_bytes(file, FEATURES, size))
    file.seek(0)
    try:
        return {FEATURES: npy.read_array(file, allow_pickle=False)}
    except ValueError:
        raise BrokenFileError("it is a NumPy array, truncated") from None


def _of_safetensors(file: BinaryIO, allow: Allow) -> Arrays:
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: header[own] for name, own in _wanted(list(header)).items()}
        kinds = {name: _DTYPES.get(entry["dtype"]) for name, entry in entries.items()}
        if None in kinds.values():
            odd = next(name for name, kind in kinds.items() if kind is None)
            raise RefusedError(f"its array {odd} has dtype {str(entries[odd]['dtype'])[:20]}: save it as F16 or F32")
        allow(sum(_stated_bytes(name, entry, kinds[name]) for name, entry in entries.items()))
        return {name: _tensor(file, 8 + length, entry, kinds[name]) for name, entry in entries.items()}
    except (RefusedError, BrokenFileError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BrokenFileError("it is a safetensors file, damaged") from None


def _stated_bytes(name: str, entry: Mapping[str, Any], kind: str | None) -> int:
    first, last = entry["data_offsets"]
    size = math.prod(entry["shape"]) * np.dtype(kind).itemsize
    if min(entry["shape"], default=0) < 0 or first < 0 or last - first != size:
        raise BrokenFileError(f"its array {name} is declared as {entry['shape']}, which the file does not hold")
    return size


def _tensor(file: BinaryIO, start: int, entry: Mapping[str, Any], kind: str | None) -> np.ndarray:
    first, last = entry["data_offsets"]
    file.seek(start + first)
    content = file.read(last - first)
    if len(content) != last - first:
        raise BrokenFileError("it is a safetensors file, truncated")
    array = np.frombuffer(content, kind).reshape(entry["shape"])
    # NumPy has no bfloat16: it is the upper half of a float32.
    return (array.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else array


def _of_hdf5(file: BinaryIO, allow: Allow) -> Arrays:
    size = file.seek(0, 2)
    try:
        with h5py.File(file, "r") as opened:
            names = [raw.decode("utf-8", "replace") for raw in opened.id]
            if len(names) > _MOST_MEMBERS:
                raise RefusedError(f"it has {len(names)} arrays, {_MOST_MEMBERS} are allowed")
            wanted = _wanted(names)
            datasets = {name: _dataset(opened, own, size) for name, own in wanted.items()}
            allow(sum(dataset.nbytes for dataset in datasets.values()))
            return {name: np.asarray(dataset[()]) for name, dataset in datasets.items()}
    except (RefusedError, BrokenFileError):
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, NotImplementedError):
        raise BrokenFileError("it is an HDF5 file, damaged") from None


def _dataset(opened: h5py.File, name: str, file_size: int) -> h5py.Dataset:
    if opened.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise RefusedError(f"its array {name} is a link, which is not followed")
    found = h5py.h5o.open(opened.id, name.encode())
    if not isinstance(found, h5py.h5d.DatasetID):
        raise RefusedError(f"{name} in it is no array: put the arrays of one sample at the top of its file")
    if (problem := dataset_problem(found, file_size)) is not None:
        raise RefusedError(f"its array {name}: {problem}")
    return h5py.Dataset(found)
