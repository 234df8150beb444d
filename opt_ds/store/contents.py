"""Rules for a shard and for the parts of a store: structure, dtypes, shapes, bounds, tokenizer, statistics, index.

`inspect` lists every problem. Training and all other readers (`store.verify`) refuse a store at the first one. A
problem is one line that names the file and the dataset.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.checks import (
    RANGES,
    box_problems,
    divided_by,
    empty_items,
    is_never_empty,
    not_finite,
    offset_problems,
    out_of_range,
    row_problems,
)
from opt_ds.store.files import folder_sha256
from opt_ds.store.index import INDEX_FILE, ShardFile, build_index, read_index
from opt_ds.store.schema import OPTIONAL_DATASETS, ShardDescription, StoreDescription, tail_shape
from opt_ds.store.statistics import TRAIN_SPLIT, statistics_problem
from opt_ds.store.tokenizer import describe_tokenizer


def description_problems(description: StoreDescription) -> list[str]:
    """Return the inconsistencies within `store.json`."""
    failures = []
    if description.with_fingerprint().fingerprint != description.fingerprint:
        failures.append("store.json: fingerprint differs from its own contents")
    if sum(shard.num_samples for shard in description.shards) != description.num_samples:
        failures.append("store.json: num_samples is not the sum over shards")
    if set(description.split_counts) != set(description.split_names):
        failures.append("store.json: split_counts and split_names name different splits")
    for name, size in description.feature_dims.items():
        statistics = description.statistics.get(name)
        if statistics is None or not len(statistics.mean) == len(statistics.std) == size:
            failures.append(f"store.json: statistics.{name}: not {size} means and standard deviations")
    return failures


def tokenizer_problems(path: Path, description: StoreDescription) -> list[str]:
    """Return where the tokenizer's folder differs from its record in `store.json`."""
    name = description.tokenizer_folder
    folder = path / name
    if not (folder / "tokenizer.json").is_file():
        return [f"{name}/tokenizer.json: missing"]
    if folder_sha256(folder) != description.tokenizer.sha256:
        return [f"{name}: files differ from store.json's checksum"]
    try:
        found, size = describe_tokenizer(folder)
    except UserError as error:
        return [str(error).replace(f"{folder}/", f"{name}/")]
    if size != description.dims.vocab_size:
        return [f"{name}: {size} tokens, store.json says {description.dims.vocab_size}"]
    if found != description.tokenizer:
        return [f"{name}: its special tokens have other ids than store.json says"]
    return []


def index_problems(path: Path, description: StoreDescription) -> list[str]:
    """Return where `index.h5` differs from the shards; an empty list if there is no usable index."""
    index = read_index(path, description)
    if index is None:
        return []
    found, own = index.datasets(), build_index(path, description).datasets()
    wrong = [name for name, array in own.items() if not np.array_equal(found[name], array)]
    return [f"{INDEX_FILE}: {', '.join(wrong)} differ from the shards: remove it"] if wrong else []


def statistics_problems(path: Path, description: StoreDescription) -> list[str]:
    """Return where the recorded feature statistics differ from those of the shards."""
    names = description.split_names
    train = names.index(TRAIN_SPLIT) if TRAIN_SPLIT in names else None
    files = [ShardFile(path / shard.file) for shard in description.shards]
    problems = (statistics_problem(files, name, train, description) for name in description.feature_dims)
    return [f"store.json: {problem}" for problem in problems if problem]


def shard_problems(path: Path, shard: ShardDescription, description: StoreDescription) -> list[str]:
    """Return what is wrong in a shard whose checksum is correct, one line per fault."""
    try:
        return _content_problems(ShardFile(path / shard.file), shard, description)
    except UserError as error:
        return [str(error).replace(f"{path / shard.file}", shard.file)]
    except Exception as error:  # damaged metadata can raise exceptions of any type
        return [f"{shard.file}: not readable as HDF5 ({type(error).__name__})"]


def _content_problems(file: ShardFile, shard: ShardDescription, description: StoreDescription) -> list[str]:
    expected = [name for name in description.datasets if name not in OPTIONAL_DATASETS]
    missing = [name for name in expected if name not in file.names()]
    if missing:
        return [f"{shard.file}: {name}: missing" for name in missing]
    if shard.num_images and (flag := _wrong_flag(file, description)):
        return [f"{shard.file}: {flag}: store.json says otherwise"]
    return [
        f"{shard.file}: {name}: {problem}"
        for name in file.names()
        for problem in _dataset_problems(name, file, shard, description)
    ]


def _wrong_flag(file: ShardFile, description: StoreDescription) -> str | None:
    for name, there in (("image/codes", description.has_codes), ("image/pixels", description.has_pixels)):
        if there and name not in file.names():
            return f"{name}: missing"
    return None


def _dataset_problems(
    name: str, file: ShardFile, shard: ShardDescription, description: StoreDescription
) -> Iterator[str]:
    array, dtype = file.array(name), description.datasets.get(name)
    if dtype is None:
        yield "unknown dataset"
        return
    if array.dtype != dtype:
        yield f"dtype {array.dtype}, not {dtype}"
        return
    shape = (_length(name, file, shard), *tail_shape(name, description.dims, description.further))
    if array.shape != shape:
        yield f"shape {list(array.shape)}, not {list(shape)}"
        return
    problem = not_finite(array)
    if problem is not None:
        yield problem
    elif name in RANGES:
        low, high = RANGES[name](shard, description)
        yield from out_of_range(array, low, high)
    if (divided := divided_by(name)) is not None:
        found = list(offset_problems(array[:], len(file.array(divided))))
        yield from found
        if not found and divided in ("samples/id", "text/utf8"):
            yield from _text_problems(file.array(divided)[:], array[:])
    if is_never_empty(name):
        yield from empty_items(array[:])
    if name == "image/boxes" and problem is None:
        yield from box_problems(array)
    if name == "samples/rows":
        yield from row_problems(array[:], {modality: shard.num_rows(modality) for modality in description.modalities})


def _text_problems(utf8: np.ndarray, offsets: np.ndarray) -> Iterator[str]:
    """Yield why concatenated strings with valid offsets are not valid UTF-8 individually."""
    try:
        utf8.tobytes().decode("utf-8")
    except UnicodeDecodeError:
        yield "its strings are not UTF-8"
        return
    starts = offsets[:-1][offsets[:-1] < len(utf8)]
    if ((utf8[starts] & 0xC0) == 0x80).any():  # an item starts in the middle of a character
        yield "splits a UTF-8 character"


def _length(name: str, file: ShardFile, shard: ShardDescription) -> int:
    """Return the first dimension that a dataset of the store must have."""
    group = name.partition("/")[0]
    if name in ("samples/id", "samples/labels", "text/utf8"):
        return len(file.array(name))  # not recorded in store.json; the offsets state it
    rows = shard.num_samples if group == "samples" else shard.num_rows(group)
    if divided_by(name) is not None:
        return rows + 1
    return rows if group == "samples" or name in OPTIONAL_DATASETS else shard.num_items(group)
