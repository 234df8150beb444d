"""Is a store whole? Checksums, finite numbers, ranges, offsets, rows, splits; and the summary for `opt-ds inspect`.

A problem is one line naming the shard and the dataset. Shards are read in blocks, so memory stays bounded.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from opt_ds.errors import UserError
from opt_ds.store.checks import (
    NEVER_EMPTY,
    OFFSETS_OF,
    RANGES,
    box_problems,
    empty_items,
    not_finite,
    offset_problems,
    out_of_range,
    row_problems,
)
from opt_ds.store.dvae import dvae_problem
from opt_ds.store.files import file_sha256, folder_sha256, write_json
from opt_ds.store.index import FIELDS, INDEX_FILE, ShardFile, build_index, read_index, write_index
from opt_ds.store.reader import check_sizes, size_problem
from opt_ds.store.schema import (
    BOX_SIZE,
    CODES_PER_IMAGE,
    DATASETS,
    DVAE_FOLDER,
    MODALITIES,
    OPTIONAL_DATASETS,
    PIXELS_SHAPE,
    ShardDescription,
    StoreDescription,
    load_description,
)

VERIFIED_FILE = "verified.json"


@dataclass(frozen=True)
class Inspection:
    """What `inspect_store` found: failures (the store must not be used), notes, and the summary as (name, value)."""

    failures: list[str]
    notes: list[str]
    summary: list[tuple[str, str]]


def inspect_store(path: str | Path) -> Inspection:
    """Check everything that can be checked. UserError only if `store.json` itself cannot be read."""
    path = Path(path)
    description = load_description(path)
    failures = _tokenizer_failures(path, description) + _description_failures(description)
    samples = _Samples()
    for shard in description.shards:
        problem = size_problem(path, shard)
        if problem is None and file_sha256(path / shard.file) != shard.sha256:
            problem = "checksum differs from store.json's"
        if problem is not None:
            failures.append(f"{shard.file}: {problem}")
        else:
            failures.extend(_shard_failures(path, shard, description, samples))
    failures.extend(samples.failures(description))
    if (problem := dvae_problem(path, description)) is not None:
        failures.append(problem)
    notes: list[str] = []
    if not failures:
        failures.extend(_index_failures(path, description, notes))
    crossing = samples.groups_across_splits()
    if crossing:
        line = f"{crossing} groups have samples in several splits"
        if description.splits_source == "manifest":
            notes.append(f"{line}, as the manifest's own splits say")
        else:
            failures.append(f"samples/split: {line}")
    return Inspection(failures, notes, _summary(path, description))


def verify_store(path: str | Path) -> None:
    """Raise UserError, naming shard and dataset, unless the store is whole. Training calls it before it builds a model.

    Sizes are checked always. Checksums, NaN/Inf and whether the dVAE is the codes' own are checked once: `verified.json`
    beside `store.json` remembers the fingerprint and all these files' sizes and times of last change; without leave to write
    there, every call checks. A store without `index.h5` gets one.
    """
    path = Path(path)
    description = load_description(path)
    check_sizes(path, description)
    files = [path / shard.file for shard in description.shards] + sorted((path / DVAE_FOLDER).glob("*"))
    stats = {str(file.relative_to(path)): file.stat() for file in files}
    state = {
        "fingerprint": description.fingerprint,
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }
    memory = path / VERIFIED_FILE
    try:
        if json.loads(memory.read_text(encoding="utf-8")) == state:
            _write_missing_index(path, description)
            return
    except (OSError, ValueError):
        pass  # never verified, or a broken note: verify again
    if (problem := dvae_problem(path, description)) is not None:
        raise UserError(problem)
    for shard in description.shards:
        if file_sha256(path / shard.file) != shard.sha256:
            raise UserError(f"{path / shard.file}: checksum differs from store.json's: prepare the store again")
        file = ShardFile(path / shard.file)
        for name in file.names():
            problem = not_finite(file.array(name))
            if problem is not None:
                raise UserError(f"{path / shard.file}: {name}: {problem}: prepare the store again")
    _write_missing_index(path, description)
    if os.access(path, os.W_OK):
        write_json(memory, state)


def _write_missing_index(path: Path, description: StoreDescription) -> None:
    """Only over verified shards: the index of damaged ones would outlive their repair."""
    if read_index(path, description) is None and os.access(path, os.W_OK):
        write_index(path, description)


class _Samples:
    """What must hold over all shards together."""

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}
        self._repeated: list[str] = []
        self._splits_of_group: dict[int, set[int]] = defaultdict(set)
        self._split_counts: dict[int, int] = defaultdict(int)

    def add(self, shard: str, ids: list[str], groups: np.ndarray, splits: np.ndarray) -> None:
        for identifier in ids:
            if self._ids.setdefault(identifier, shard) != shard or identifier == "":
                self._repeated.append(
                    f'{shard}: samples/id: "{identifier}" is empty or also in {self._ids[identifier]}'
                )
        if len(set(ids)) != len(ids):
            self._repeated.append(f"{shard}: samples/id: repeated ids")
        for group, split in set(zip(groups.tolist(), splits.tolist(), strict=True)):
            self._splits_of_group[group].add(split)
        for split, count in zip(*np.unique(splits, return_counts=True), strict=True):
            self._split_counts[int(split)] += int(count)

    def groups_across_splits(self) -> int:
        return sum(len(splits) > 1 for splits in self._splits_of_group.values())

    def failures(self, description: StoreDescription) -> list[str]:
        counts = {name: self._split_counts[code] for code, name in enumerate(description.split_names)}
        all_read = sum(counts.values()) == description.num_samples
        wrong = all_read and counts != description.split_counts
        return self._repeated + (["store.json: split_counts differ from samples/split"] if wrong else [])


def _index_failures(path: Path, description: StoreDescription, notes: list[str]) -> list[str]:
    index = read_index(path, description)
    if index is None:
        notes.append(f"no {INDEX_FILE} of this store: it opens more slowly; training writes one")
        return []
    own = build_index(path, description)
    wrong = [name for name in FIELDS if not np.array_equal(getattr(index, name), getattr(own, name))]
    return [f"{INDEX_FILE}: {', '.join(wrong)} differ from the shards: remove it"] if wrong else []


def _tokenizer_failures(path: Path, description: StoreDescription) -> list[str]:
    name = description.tokenizer_folder
    folder = path / name
    if not (folder / "tokenizer.json").is_file():
        return [f"{name}/tokenizer.json: missing"]
    if folder_sha256(folder) != description.tokenizer.sha256:
        return [f"{name}: files differ from store.json's checksum"]
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    if size != description.dims.vocab_size:
        return [f"{name}: {size} tokens, store.json says {description.dims.vocab_size}"]
    return []


def _description_failures(description: StoreDescription) -> list[str]:
    failures = []
    if description.with_fingerprint().fingerprint != description.fingerprint:
        failures.append("store.json: fingerprint differs from its own contents")
    if sum(shard.num_samples for shard in description.shards) != description.num_samples:
        failures.append("store.json: num_samples is not the sum over shards")
    sizes = {"image": description.dims.image_feature_dim, "audio": description.dims.audio_feature_dim}
    for name, size in sizes.items():
        statistics = description.statistics.get(name)
        if statistics is None or not len(statistics.mean) == len(statistics.std) == size:
            failures.append(f"store.json: statistics.{name}: not {size} means and standard deviations")
        elif not np.isfinite([*statistics.mean, *statistics.std]).all():
            failures.append(f"store.json: statistics.{name}: not finite")
    return failures


def _shard_failures(path: Path, shard: ShardDescription, description: StoreDescription, samples: _Samples) -> list[str]:
    try:
        return _content_failures(ShardFile(path / shard.file), shard, description, samples)
    except Exception as error:  # broken metadata can be wrong in any way
        return [f"{shard.file}: not readable as HDF5 ({' '.join(str(error).split())})"]


def _content_failures(
    file: ShardFile, shard: ShardDescription, description: StoreDescription, samples: _Samples
) -> list[str]:
    expected = [name for name in DATASETS if name not in OPTIONAL_DATASETS]
    missing = [name for name in expected if name not in file.names()]
    if missing:
        return [f"{shard.file}: {name}: missing" for name in missing]
    failures = [
        f"{shard.file}: {name}: {problem}"
        for name in file.names()
        for problem in _dataset_problems(name, file, shard, description)
    ]
    # Ids and groups can only be read where the shapes and offsets hold.
    if not any("samples/" in failure for failure in failures):
        ids = [_bytes(file, index).decode("utf-8", "replace") for index in range(shard.num_samples)]
        samples.add(shard.file, ids, file.array("samples/group")[:], file.array("samples/split")[:])
    return failures


def _bytes(file: ShardFile, index: int) -> bytes:
    return file.item("samples/id", "samples/id_offsets", index).tobytes()


def _dataset_problems(
    name: str, file: ShardFile, shard: ShardDescription, description: StoreDescription
) -> Iterator[str]:
    array = file.array(name)
    if name not in DATASETS:
        yield "unknown dataset"
        return
    if array.dtype != DATASETS[name]:
        yield f"dtype {array.dtype}, not {DATASETS[name]}"
        return
    shape = _shapes(file, shard, description)[name]
    if array.shape != shape:
        yield f"shape {list(array.shape)}, not {list(shape)}"
        return
    problem = not_finite(array)
    if problem is not None:
        yield problem
    elif name in RANGES:
        low, high = RANGES[name](shard, description)
        yield from out_of_range(array, low, high)
    if name.endswith("offsets"):
        yield from offset_problems(array[:], len(file.array(OFFSETS_OF[name])))
    if name in NEVER_EMPTY:
        yield from empty_items(array[:])
    if name == "image/boxes" and problem is None:
        yield from box_problems(array)
    if name == "samples/rows":
        yield from row_problems(array[:], shard)


def _shapes(file: ShardFile, shard: ShardDescription, description: StoreDescription) -> dict[str, tuple[int, ...]]:
    samples, images, regions = shard.num_samples, shard.num_images, shard.num_regions
    flat = {name: (len(file.array(name)),) for name in ("samples/id", "samples/labels", "text/utf8")}
    return {
        **flat,
        "samples/rows": (samples, len(MODALITIES)),
        "samples/id_offsets": (samples + 1,),
        "samples/group": (samples,),
        "samples/split": (samples,),
        "samples/label_offsets": (samples + 1,),
        "text/tokens": (shard.num_tokens,),
        "text/offsets": (shard.num_texts + 1,),
        "text/utf8_offsets": (shard.num_texts + 1,),
        "image/offsets": (images + 1,),
        "image/features": (regions, description.dims.image_feature_dim),
        "image/boxes": (regions, BOX_SIZE),
        "image/labels": (regions,),
        "image/scores": (regions,),
        "image/codes": (images, CODES_PER_IMAGE),
        "image/pixels": (images, *PIXELS_SHAPE),
        "audio/offsets": (shard.num_audios + 1,),
        "audio/features": (shard.num_frames, description.dims.audio_feature_dim),
    }


def _summary(path: Path, description: StoreDescription) -> list[tuple[str, str]]:
    def total(name: str) -> int:
        return sum(getattr(shard, name) for shard in description.shards)

    def per(count: int, rows: int) -> str:
        return f"{count / rows:.1f}" if rows else "0"

    dims = description.dims
    texts, images, audios = total("num_texts"), total("num_images"), total("num_audios")
    regions, frames = per(total("num_regions"), images), per(total("num_frames"), audios)
    extractors = ", ".join(
        f"{kind}: {identity.get('name')}" for kind, identity in sorted(description.extractors.items())
    )
    codes = f"{dims.num_codes} in the codebook" if description.has_codes else "none"
    return [
        ("store", str(path)),
        ("fingerprint", description.fingerprint),
        ("samples", str(description.num_samples)),
        ("splits", ", ".join(f"{name} {count}" for name, count in description.split_counts.items())),
        ("texts", f"{texts}, {per(total('num_tokens'), texts)} tokens each, vocabulary of {dims.vocab_size}"),
        ("images", f"{images}, {regions} regions each of {dims.image_feature_dim} dimensions"),
        ("image classes", str(dims.image_num_classes)),
        ("audios", f"{audios}, {frames} frames each of {dims.audio_feature_dim} dimensions"),
        ("audio frame rate", f"{dims.audio_frame_rate_hz:g} Hz"),
        ("image codes", codes),
        ("pixels", "64 x 64" if description.has_pixels else "none"),
        ("labels", str(len(description.label_names))),
        ("extractors", extractors),
        (
            "shards",
            f"{len(description.shards)}, {total('bytes') / 2**20:.1f} MiB, compression {description.compression}",
        ),
    ]
