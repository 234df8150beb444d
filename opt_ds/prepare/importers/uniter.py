"""UNITER's image feature databases (LMDB): each entry becomes the `.npz` file that it was made of."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.files import atomic_file

_DATABASE = "data.mdb"


def is_lmdb(folder: Path) -> bool:
    """Whether a folder holds an LMDB database."""
    return (folder / _DATABASE).is_file()


def export_lmdb(database: Path, output: Path, *, say: Callable[[str], None] = print) -> int:
    """Write every entry of the database as a file of `output`; files that are there are kept, so that it resumes.

    Entries are compressed NPZ files, or msgpack of arrays, as UNITER's convert_imgdir.py writes them. Returns their number.
    """
    output.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, value in _entries(database):
        target = output / Path(name).with_suffix(".npz").name
        count += 1
        if target.is_file():
            continue
        arrays = _arrays(value, f"{database}: {name}")
        with atomic_file(target) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    if not count:
        raise UserError(f"{database}: the database is empty")
    say(f"{output}: {count} files; name them as image in a manifest, and give opt-ds prepare --images npz")
    return count


def _entries(database: Path) -> Iterator[tuple[str, bytes]]:
    try:
        import lmdb
    except ImportError:
        raise UserError(f"{database}: reading LMDB needs lmdb and msgpack: pip install 'opt_ds[tables]'") from None
    try:
        with (
            lmdb.open(str(database), readonly=True, lock=False, readahead=False, create=False) as environment,
            environment.begin(buffers=False) as transaction,
        ):
            for key, value in transaction.cursor():
                if not key.startswith(b"__"):  # __keys__ lists the others
                    yield key.decode("utf-8"), value
    except lmdb.Error as error:
        raise UserError(f"{database}: not readable as LMDB ({error})") from None


def _arrays(value: bytes, where: str) -> dict[str, Any]:
    import msgpack

    try:
        if value.startswith(b"PK"):
            with np.load(io.BytesIO(value), allow_pickle=False) as arrays:
                return dict(arrays)
        fields = msgpack.unpackb(value, raw=False, object_hook=_array)
    except (ValueError, OSError, msgpack.UnpackException) as error:
        raise UserError(f"{where}: neither NPZ nor msgpack ({error})") from None
    return {name: array for name, array in fields.items() if isinstance(array, np.ndarray)}


def _array(fields: dict[Any, Any]) -> Any:
    """Undo msgpack_numpy's form of an array: {b"nd": True, b"type": "<f2", b"kind": b"", b"shape": …, b"data": …}."""
    named = {key.decode() if isinstance(key, bytes) else key: value for key, value in fields.items()}
    if named.get("nd") is not True:
        return fields
    kind = named["type"].decode() if isinstance(named["type"], bytes) else named["type"]
    return np.frombuffer(named["data"], np.dtype(kind)).reshape(named["shape"])
