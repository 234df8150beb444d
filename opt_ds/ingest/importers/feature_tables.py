"""Export tables of image features: one `.npz` file per image, for `--images region_files`.

TSV files of base64 arrays, gzipped or not, in the published forms:

    image_id, image_w, image_h, num_boxes, boxes, features                                      bottom-up-attention
    img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf, num_boxes, boxes, features    LXMERT
    img_id, img_w, img_h, num_boxes, boxes, features, cls_prob                                   Conceptual Captions (UNITER)
    image key, num_boxes, features                                                               Oscar
    image key, {"num_boxes": …, "features": …}                                                   VinVL

HDF5, safetensors and NPZ files with an array, or in HDF5 a group of arrays, per image.
"""

import base64
import binascii
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from opt_ds.decoding.array_files import ARRAYS, FEATURES, load_npz_member, npz_members
from opt_ds.decoding.limits import Limits
from opt_ds.decoding.reasons import BrokenFileError, RefusedError
from opt_ds.errors import UserError
from opt_ds.features.feature_arrays import by_name, features_of
from opt_ds.features.region_files import OTHER_NAMES
from opt_ds.ingest.importers.feature_folder import FeatureFolder
from opt_ds.ingest.text_files import JsonError, byte_lines, open_bytes, parse_json
from opt_ds.store.hdf5 import dataset_problem

_HDF5, _ZIP = b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"
_COLUMNS: dict[int, tuple[str, ...]] = {
    6: ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
    10: (
        "image_id", "image_h", "image_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes",
        "features",
    ),
    7: ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features", "cls_prob"),
    3: ("image_id", "num_boxes", "features"),
    2: ("image_id", "json"),
}  # fmt: skip
_PLACE = 6  # x1, y1, x2, y2, w, h behind the features of Oscar and VinVL
_TOLERANCE = 2e-3


class _Entry(NamedTuple):
    """An image of a table. `load` returns its arrays, or raises ValueError."""

    key: str
    load: Callable[[], Mapping[str, np.ndarray]]


def export_table(table: Path, output: Path) -> int:
    """Write every image of the table as a file in `output`. Existing files are kept, so that it can be resumed.

    Images that cannot be used are left out and logged. Return the number of files. Raise UserError if there are none, or if the
    file is no such table.
    """
    with open(table, "rb") as file:
        head = file.read(9)
    if head.startswith(_HDF5):
        entries = _of_hdf5(table)
    elif head.startswith(_ZIP):
        entries = _of_npz(table)
    elif len(head) == 9 and head[8:] == b"{" and head[7] == 0:  # a length of eight bytes, then JSON
        entries = _of_safetensors(table)
    else:
        entries = _of_tsv(table)
    folder, seen = FeatureFolder(table, output), set[str]()
    for entry in entries:
        if isinstance(entry, str):
            folder.skip(*entry.split(": ", 1))
        elif not entry.key or entry.key in seen:
            folder.skip(entry.key or "an image", "its key is empty" if not entry.key else "its key occurs twice")
        else:
            seen.add(entry.key)
            folder.write(entry.key, folder.name(entry.key), partial(_usable, entry.load))
    return folder.finish("region_files")


def _usable(load: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Return the arrays of an image. Raise ValueError if their features are none that `region_files` reads."""
    arrays = load()
    features_of(by_name(arrays, OTHER_NAMES))
    return arrays


def _refuse_one_image(table: Path, names: Collection[str]) -> None:
    """Raise UserError if the arrays with these names are those of one image."""
    if FEATURES in names or (names and set(names) <= set(ARRAYS)):
        raise UserError(f"{table}: the features of one image, not a table: name it as image in a manifest")


def _of_tsv(table: Path) -> Iterator[_Entry | str]:
    """Yield the images of a TSV file, and "line N: reason" for lines that are none."""
    number_of_columns = 0
    with open_bytes(table) as file:
        for number, raw in byte_lines(file):
            cells = raw.decode("utf-8", "replace").split("\t")
            if not number_of_columns:
                number_of_columns = len(cells)
                if number_of_columns not in _COLUMNS:
                    raise UserError(
                        f"{table}: line {number} has {number_of_columns} columns: neither a store nor a table of image features "
                        "(TSV of LXMERT, Oscar or bottom-up-attention, HDF5, safetensors, NPZ)"
                    )
                if "features" in cells[1:]:  # a header
                    continue
            if len(cells) != number_of_columns:
                yield f"line {number}: {len(cells)} columns, not {number_of_columns}"
                continue
            row = dict(zip(_COLUMNS[number_of_columns], cells, strict=True))
            yield _Entry(row["image_id"].strip(), partial(_arrays_of_row, row))


def _arrays_of_row(row: dict[str, str]) -> dict[str, np.ndarray]:
    if "json" in row:
        row = _fields_of_json(row["json"])
    count = _integer(row, "num_boxes")
    features = _array(row, "features", "<f4", count)
    if "boxes" not in row:
        return _split_place(features)
    arrays = {
        FEATURES: features,
        "bbox": _array(row, "boxes", "<f4", count),
        "image_w": np.array(_integer(row, "image_w")),
        "image_h": np.array(_integer(row, "image_h")),
    }
    if "objects_id" in row:
        arrays["labels"] = _array(row, "objects_id", "<i8", count)[:, 0]
        arrays["scores"] = _array(row, "objects_conf", "<f4", count)[:, 0]
    if "cls_prob" in row:
        arrays["soft_labels"] = _array(row, "cls_prob", "<f4", count)
        arrays["scores"] = arrays["soft_labels"][:, 1:].max(1) if arrays["soft_labels"].shape[1] > 1 else np.ones(count, "<f4")
    return arrays


def _fields_of_json(text: str) -> dict[str, str]:
    try:
        fields = parse_json(text)
    except JsonError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict) or not {"num_boxes", "features"} <= fields.keys():
        raise ValueError("its JSON has no num_boxes and features (is this the table of labels?)")
    return {name: str(fields[name]) for name in ("num_boxes", "features")}


def _integer(row: Mapping[str, str], name: str) -> int:
    text = row[name].strip()
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**20):
        raise ValueError(f"{name} is {text[:20]!r}, not a number above 0")
    return int(text)


def _array(row: Mapping[str, str], name: str, kind: str, count: int) -> np.ndarray:
    """Return the array [count, N] that a cell has in base64."""
    try:
        content = base64.b64decode(row[name], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name} is not base64, or truncated") from None
    size = np.dtype(kind).itemsize
    if not content or len(content) % (size * count):
        raise ValueError(f"{name} has {len(content)} bytes, which are not {count} rows of {kind[1:]}")
    return np.frombuffer(content, kind).reshape(count, -1)


def _split_place(features: np.ndarray) -> dict[str, np.ndarray]:
    """Return the features without the place that Oscar and VinVL append, and the place as boxes in 0..1.

    It is recognised by its values: width and height follow from the corners. Otherwise the features have no boxes.
    """
    if features.shape[1] > _PLACE:
        x1, y1, x2, y2, width, height = features[:, -_PLACE:].T
        place = features[:, -_PLACE:]
        fits = (np.abs(x2 - x1 - width) <= _TOLERANCE) & (np.abs(y2 - y1 - height) <= _TOLERANCE)
        if fits.all() and (place >= -_TOLERANCE).all() and (place <= 1 + _TOLERANCE).all():
            return {FEATURES: features[:, :-_PLACE], "boxes": np.clip(place, 0, 1)}
    return {FEATURES: features}


def _of_hdf5(table: Path) -> Iterator[_Entry | str]:
    size = table.stat().st_size
    try:
        with h5py.File(table, "r", locking=False) as file:
            names = [raw.decode("utf-8", "replace") for raw in file.id]
            _refuse_one_image(table, [name for name in names if name not in ARRAYS or _is_array(file, name)])
            for raw, key in zip(file.id, names, strict=True):
                if not _is_hard(file.id, raw):
                    yield f"{key}: a link, which is not followed"
                    continue
                yield _Entry(key, partial(_arrays_of_object, h5py.h5o.open(file.id, raw), size))
    except (OSError, RuntimeError, KeyError):
        raise UserError(f"{table}: the HDF5 file is truncated or damaged: copy it again") from None


def _is_hard(group: h5py.h5g.GroupID, raw: bytes) -> bool:
    """Return whether a name of a group is no link to another place or file."""
    return group.links.get_info(raw).type == h5py.h5l.TYPE_HARD


def _is_array(file: h5py.File, name: str) -> bool:
    raw = name.encode()
    return _is_hard(file.id, raw) and isinstance(h5py.h5o.open(file.id, raw), h5py.h5d.DatasetID)


def _arrays_of_object(found: Any, size: int) -> dict[str, np.ndarray]:
    """Return the arrays of a group, or the features that are a dataset."""
    if isinstance(found, h5py.h5d.DatasetID):
        return {FEATURES: _read(FEATURES, found, size)}
    if not isinstance(found, h5py.h5g.GroupID):
        raise ValueError("neither a group nor an array")
    names = [raw.decode("utf-8", "replace") for raw in found]
    arrays = {}
    for name in names:
        if name in ARRAYS and _is_hard(found, name.encode()):
            inner = h5py.h5o.open(found, name.encode())
            if isinstance(inner, h5py.h5d.DatasetID):
                arrays[name] = _read(name, inner, size)
    if not arrays:
        raise ValueError(f"its group has none of the arrays {', '.join(ARRAYS)}")
    return arrays


def _read(name: str, dataset: Any, size: int) -> np.ndarray:
    try:
        if (problem := dataset_problem(dataset, size)) is not None:
            raise ValueError(f"{name}: {problem}")
        opened = h5py.Dataset(dataset)
        Limits().of_arrays(opened.nbytes)
        return np.asarray(opened[()])
    except RefusedError as error:
        raise ValueError(str(error)) from None
    except (OSError, RuntimeError, TypeError):
        raise ValueError(f"{name}: it cannot be read, the file is damaged") from None


def _of_npz(table: Path) -> Iterator[_Entry | str]:
    try:
        archive = zipfile.ZipFile(table)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise UserError(f"{table}: the NPZ file is truncated or damaged: copy it again") from None
    with archive:
        try:
            members = npz_members(archive)
        except BrokenFileError as error:
            raise UserError(f"{table}: {error}") from None
        _refuse_one_image(table, members)
        for key, member in members.items():
            yield _Entry(key, partial(_member, archive, member))


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> dict[str, np.ndarray]:
    return {FEATURES: load_npz_member(archive, member, Limits().of_arrays)}


def _of_safetensors(table: Path) -> Iterator[_Entry | str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(table, "np") as file:
            keys = list(file.keys())
            _refuse_one_image(table, keys)
            for key in keys:
                yield _Entry(key, partial(_tensor, file, key))
    except SafetensorError:
        raise UserError(f"{table}: the safetensors file is truncated or damaged: copy it again") from None


def _tensor(file: Any, key: str) -> dict[str, np.ndarray]:
    try:
        return {FEATURES: file.get_tensor(key)}
    except TypeError:  # NumPy has no bfloat16
        raise ValueError("a type that NumPy does not have: save it as float16 or float32") from None
