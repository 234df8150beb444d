"""Export UNITER's image feature databases (LMDB): each entry is written as the `.npz` file that it was made from."""

import hashlib
import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from opt_ds.decoding.array_files import load_arrays
from opt_ds.decoding.limits import Limits
from opt_ds.decoding.reasons import BrokenFileError, RefusedError
from opt_ds.errors import UserError
from opt_ds.ingest.importers.feature_folder import FeatureFolder, is_file_name, plain_name

_DATABASE = "data.mdb"
_OWN = b"__"  # prefix of metadata keys, such as __keys__, which lists the others
_BROKEN = (ValueError, OSError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)


def is_lmdb(folder: Path) -> bool:
    """Return whether a folder contains an LMDB database."""
    return (folder / _DATABASE).is_file()


def export_lmdb(database: Path, output: Path) -> int:
    """Write every entry of the database as a file in `output`. Existing files are kept, so that it can be resumed.

    Entries are compressed NPZ files, or msgpack of arrays, as written by UNITER's convert_imgdir.py. Others are skipped
    and logged. Return the number of files. Raise UserError if there are none.
    """
    folder = FeatureFolder(database, output)
    names, unnamed = _names(_keys(database))
    for raw in unnamed:
        folder.skip(repr(raw), "its key is not UTF-8")
    for key, value in _entries(database):
        if key in names:
            folder.write(key, names[key], partial(_arrays, value))
    return folder.finish("npz")


def _names(keys: Iterator[bytes]) -> tuple[dict[str, str], list[bytes]]:
    """Return key -> file name, without duplicates, and the keys that are not valid text.

    The name is the last part of the key with the ending .npz. If several keys share that name, the complete key is used
    instead, quoted as in a URL.
    """
    texts: list[str] = []
    unnamed: list[bytes] = []
    for raw in keys:
        try:
            texts.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            unnamed.append(raw)
    plain = Counter(map(plain_name, texts))
    names = {key: name for key in texts if plain[name := plain_name(key)] == 1 and is_file_name(name)}
    taken = set(plain)
    for key in texts:
        if key not in names:
            name = f"{quote(key, safe='')}.npz"
            if name in taken or not is_file_name(name):
                name = f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.npz"
            names[key] = name
            taken.add(name)
    return names, unnamed


def _keys(database: Path) -> Iterator[bytes]:
    with _cursor(database) as cursor:
        yield from (key for key in cursor.iternext(keys=True, values=False) if not key.startswith(_OWN))


def _entries(database: Path) -> Iterator[tuple[str, bytes]]:
    with _cursor(database) as cursor:
        for key, value in cursor.iternext():
            if not key.startswith(_OWN):
                yield key.decode("utf-8", "backslashreplace"), value


@contextmanager
def _cursor(database: Path) -> Iterator[Any]:
    try:
        import lmdb
    except ImportError:
        raise UserError(f"{database}: reading LMDB needs lmdb and msgpack: pip install 'opt_ds[tables]'") from None
    try:
        with (
            lmdb.open(str(database), readonly=True, lock=False, readahead=False, create=False) as environment,
            environment.begin(buffers=False) as transaction,
        ):
            yield transaction.cursor()
    except lmdb.Error:
        raise UserError(f"{database}: not readable as LMDB: copy {_DATABASE} again") from None


def _arrays(value: bytes) -> dict[str, Any]:
    """Return the arrays of an entry. Raise ValueError for anything else."""
    import msgpack

    try:
        if value.startswith(b"PK"):
            return load_arrays(io.BytesIO(value), Limits().of_arrays)
        fields = msgpack.unpackb(value, raw=False, object_hook=_array)
    except (BrokenFileError, RefusedError) as error:
        raise ValueError(str(error)) from None
    except (*_BROKEN, msgpack.UnpackException):
        raise ValueError("neither NPZ nor msgpack") from None
    items = fields.items() if isinstance(fields, dict) else ()
    found = {name: array for name, array in items if isinstance(name, str) and isinstance(array, np.ndarray)}
    if not found:
        raise ValueError("it holds no arrays")
    return found


def _array(fields: dict[Any, Any]) -> Any:
    """Decode msgpack_numpy's form of an array: {b"nd": True, b"type": "<f2", b"kind": b"", b"shape": …, b"data": …}."""
    named = {key.decode() if isinstance(key, bytes) else key: value for key, value in fields.items()}
    if named.get("nd") is not True:
        return fields
    kind = named["type"].decode() if isinstance(named["type"], bytes) else named["type"]
    return np.frombuffer(named["data"], np.dtype(kind)).reshape(named["shape"])
