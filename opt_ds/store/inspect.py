"""`opt-ds inspect`: list every fault of a store, one per line, and summarise its contents.

Near-duplicates are reported as notes. Shards are read in blocks, so memory stays bounded.
`store.verify` applies the same rules before a store is used.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opt_ds.store.clusters import IMAGE_LABELS, clusters_problem
from opt_ds.store.contents import (
    description_problems,
    index_problems,
    shard_problems,
    statistics_problems,
    tokenizer_problems,
)
from opt_ds.store.dvae import dvae_problem
from opt_ds.store.files import file_sha256
from opt_ds.store.index import INDEX_FILE, ShardFile, read_index
from opt_ds.store.near_duplicates import near_duplicate_notes
from opt_ds.store.reader import FeatureStore, size_problem
from opt_ds.store.schema import MODALITIES, ShardDescription, StoreDescription, load_description


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect_store`: failures (the store must not be used), notes, and the summary as (name, value)."""

    failures: list[str]
    notes: list[str]
    summary: list[tuple[str, str]]


def inspect_store(path: str | Path, *, near_duplicates: bool = True) -> Inspection:
    """Check everything that can be checked. Raise UserError only if `store.json` itself cannot be read.

    `near_duplicates`: count them too, which takes longer than the other checks if the store is large.
    """
    path = Path(path)
    description = load_description(path)
    failures = tokenizer_problems(path, description) + description_problems(description)
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
    for problem in (dvae_problem(path, description), clusters_problem(path, description.extractors)):
        if problem is not None:
            failures.append(problem)
    notes: list[str] = []
    if not failures:
        failures += statistics_problems(path, description) + index_problems(path, description)
        if read_index(path, description) is None:
            notes.append(f"no {INDEX_FILE} of this store: it opens more slowly; training writes one")
    crossing = samples.groups_across_splits()
    if crossing:
        line = f"{crossing} groups have samples in several splits"
        if description.splits_source == "manifest":
            notes.append(f"{line}, as the manifest's splits require")
        else:
            failures.append(f"samples/split: {line}")
    if not failures:
        notes += near_duplicate_notes(FeatureStore(path)) if near_duplicates else ["near-duplicates were not looked for"]
    return Inspection(failures, notes, _summary(path, description))


class _Samples:
    """Collects the ids, groups and splits of all shards, for rules that span shards."""

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}
        self._repeated: list[str] = []
        self._splits_of_group: dict[int, set[int]] = defaultdict(set)
        self._split_counts: dict[int, int] = defaultdict(int)

    def add(self, shard: str, ids: list[str], groups: np.ndarray, splits: np.ndarray) -> None:
        """Add the samples of one shard."""
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
        """Return the number of groups with samples in several splits."""
        return sum(len(splits) > 1 for splits in self._splits_of_group.values())

    def failures(self, description: StoreDescription) -> list[str]:
        """Return repeated ids, and split counts that differ from `store.json`."""
        counts = {name: self._split_counts[code] for code, name in enumerate(description.split_names)}
        all_read = sum(counts.values()) == description.num_samples
        wrong = all_read and counts != description.split_counts
        return self._repeated + (["store.json: split_counts differ from samples/split"] if wrong else [])


def _shard_failures(path: Path, shard: ShardDescription, description: StoreDescription, samples: _Samples) -> list[str]:
    failures = shard_problems(path, shard, description)
    if not failures:
        file = ShardFile(path / shard.file)
        ids = [
            file.item("samples/id", "samples/id_offsets", index).tobytes().decode("utf-8", "replace")
            for index in range(shard.num_samples)
        ]
        samples.add(shard.file, ids, file.array("samples/group")[:], file.array("samples/split")[:])
    return failures


def _classes(description: StoreDescription) -> str:
    count = description.dims.image_num_classes
    if count < 2:
        return "none (MRC is disabled)"
    return f"{count} clusters by k-means" if IMAGE_LABELS in description.extractors else str(count)


def _summary(path: Path, description: StoreDescription) -> list[tuple[str, str]]:
    def each(modality: str) -> str:
        rows = description.num_rows(modality)
        return f"{description.num_items(modality) / rows:.1f} {units[modality]} each" if rows else f"0 {units[modality]} each"

    def further(name: str) -> str:
        modality = description.further[name]
        columns = f"{each(name)} of {modality.feature_dim} dimensions; columns {', '.join(modality.columns)}"
        return f"{description.num_rows(name)}, {columns}"

    dims, units = description.dims, description.units
    size = sum(shard.bytes for shard in description.shards)
    texts, images, audios = (description.num_rows(modality) for modality in MODALITIES)
    extractors = ", ".join(
        f"{kind}: {fingerprint.get('name')}" for kind, fingerprint in sorted(description.extractors.items())
    )
    codes = f"{dims.num_codes} in the codebook" if description.has_codes else "none"
    return [
        ("store", str(path)),
        ("fingerprint", description.fingerprint),
        ("samples", str(description.num_samples)),
        ("splits", ", ".join(f"{name} {count}" for name, count in description.split_counts.items())),
        ("texts", f"{texts}, {each('text')}, vocabulary of {dims.vocab_size}"),
        ("images", f"{images}, {each('image')} of {dims.image_feature_dim} dimensions"),
        ("image classes", _classes(description)),
        ("audios", f"{audios}, {each('audio')} of {dims.audio_feature_dim} dimensions"),
        ("audio frame rate", f"{dims.audio_frame_rate_hz:g} Hz"),
        *((name, further(name)) for name in description.further),
        ("image codes", codes),
        ("pixels", "64 x 64" if description.has_pixels else "none"),
        ("labels", str(len(description.label_names))),
        ("extractors", extractors),
        (
            "shards",
            f"{len(description.shards)}, {size / 2**20:.1f} MiB, compression {description.compression}",
        ),
    ]
