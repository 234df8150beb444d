"""Open HDF5 files of unknown origin.

Features that a store's files never have are refused before any data is read: data outside the file (external storage,
external and soft links, virtual datasets), types other than plain numbers, filters other than gzip and shuffle, and
shapes that require more data than the file has.
"""

import math
from pathlib import Path

import h5py

from opt_ds.errors import UserError

_MAX_OBJECTS = 100
_MAX_DEPTH = 3
_MOST_DEFLATED = 1040  # deflate compresses to 1/1032 at best
_FILTERS = (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE)
_LIBRARY_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, NotImplementedError)


def open_hdf5(path: Path) -> h5py.File:
    """Open a file of groups and plain datasets for reading.

    Raise UserError, naming the dataset, for anything else in it.
    """
    file = None
    try:
        # Some network file systems refuse HDF5's lock. A store is never written in place, so no lock is needed.
        file = h5py.File(path, "r", locking=False)
        _check_group(file.id, path.stat().st_size, "", [])
    except UserError as error:
        _close(file)
        raise UserError(f"{path}: {error}") from None
    except _LIBRARY_ERRORS:
        _close(file)
        raise UserError(f"{path}: not readable as HDF5: restore the file, or prepare the store again") from None
    return file


def _close(file: h5py.File | None) -> None:
    if file is not None:
        file.close()


def _check_group(group: h5py.h5g.GroupID, file_size: int, prefix: str, seen: list[str]) -> None:
    for raw in group:
        name = f"{prefix}{raw.decode('utf-8', 'replace')}"
        seen.append(name)
        if len(seen) > _MAX_OBJECTS or name.count("/") >= _MAX_DEPTH:
            raise UserError("more groups and datasets than a store's file has")
        if group.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
            raise UserError(f"{name}: a link out of the file, which is not allowed in a store")
        found = h5py.h5o.open(group, raw)
        if isinstance(found, h5py.h5g.GroupID):
            _check_group(found, file_size, f"{name}/", seen)
        elif isinstance(found, h5py.h5d.DatasetID):
            problem = dataset_problem(found, file_size)
            if problem:
                raise UserError(f"{name}: {problem}")
        else:
            raise UserError(f"{name}: neither a group nor a dataset")


def dataset_problem(dataset: h5py.h5d.DatasetID, file_size: int) -> str | None:
    """Return why a dataset is not allowed in a file of unknown origin; None if it is allowed.

    The order of the checks matters: reading the shape of a virtual dataset may open other files.
    """
    properties = dataset.get_create_plist()
    layout = properties.get_layout()
    if layout == h5py.h5d.VIRTUAL:
        return "a virtual dataset, whose data lie in other files"
    if properties.get_external_count():
        return "external storage: its data lie in other files"
    if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
        return "a storage layout other than contiguous and chunked"
    kind = dataset.get_type().get_class()
    if kind not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT):
        return "a type that is neither integers nor floats"
    filters = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
    if any(code not in _FILTERS for code in filters):
        return "a compression filter other than gzip and shuffle"
    size = math.prod(dataset.shape) * dataset.get_type().get_size()
    stored = dataset.get_storage_size()
    if layout == h5py.h5d.CONTIGUOUS and size:
        offset = dataset.get_offset()
        if offset is None or offset + size > file_size:
            return f"shape {list(dataset.shape)} needs more bytes than the file has"
    elif stored > file_size or size > stored * (_MOST_DEFLATED if filters else 1):
        return f"shape {list(dataset.shape)} needs more bytes than the file has"
    return None
