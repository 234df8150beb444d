"""The end of preparation: complete a store, or one of n partitions of it (for a job array), and merge such partitions.

    <store>.part-2-of-16/    shards 2, 18, 34 … with their journals, the tokenizer, and part.json, which is written last
"""

import logging
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from opt_ds.errors import UserError
from opt_ds.ingest.image_labels import label_shards
from opt_ds.ingest.report import REPORT_FILE, build_report, report_table
from opt_ds.store.clusters import CLUSTER_FILES, IMAGE_LABELS
from opt_ds.store.files import atomic_file, exclusive_use, file_sha256, write_json
from opt_ds.store.foreign import read_json_object
from opt_ds.store.lengths import LENGTHS_FILE, draw_lengths, shard_lengths
from opt_ds.store.schema import (
    STORE_FILE,
    TOKENIZER_FOLDER,
    Dims,
    FurtherModality,
    ShardDescription,
    StoreDescription,
    load_description,
)
from opt_ds.store.writer import StoreWriter

_LOG = logging.getLogger(__name__)
PART_FILE = "part.json"


@dataclass(frozen=True)
class StoreMetadata:
    """Store metadata: what a store consists of besides its shards. It is equal in all partitions of one store."""

    dims: Dims
    split_names: list[str]
    splits_source: Literal["manifest", "group hash"]
    extractors: dict[str, dict[str, Any]]
    label_names: list[str]
    info: dict[str, Any]
    key: str
    compression: Literal["gzip"] | None
    num_shards: int
    num_lines: int
    groups_across_splits: int
    rejected: list[dict[str, str]]  # id and reason of manifest lines that are not samples
    limits: dict[str, int | None]  # max_tokens, max_frames
    further: dict[str, FurtherModality] = field(default_factory=dict)
    image_labels: str | None = None  # `identity` of the source of region labels; None: the extractor's own

    def writer(self, path: Path, tokenizer_folder: Path) -> StoreWriter:
        """Create, or resume, a store at `path`."""
        return StoreWriter(
            path, dims=self.dims, split_names=self.split_names, splits_source=self.splits_source, extractors=self.extractors,
            tokenizer_folder=tokenizer_folder, label_names=self.label_names, info=self.info, key=self.key,
            compression=self.compression, further=self.further,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Return the metadata as JSON values."""
        values = {**asdict(self), "dims": self.dims.model_dump()}
        del values["further"]
        if self.image_labels is None:  # partitions of earlier versions do not have it
            del values["image_labels"]
        described = [[name, modality.model_dump(mode="json")] for name, modality in self.further.items()]
        return {**values, "further": described} if described else values

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "StoreMetadata":
        """Build from the output of `as_dict`."""
        further = {name: FurtherModality.model_validate(fields) for name, fields in values.get("further", [])}
        return StoreMetadata(**{**values, "dims": Dims(**values["dims"]), "further": further})


def finish_store(facts: StoreMetadata, writer: StoreWriter, output: Path, seconds: float) -> StoreDescription:
    """Write report.json, lengths.png and store.json.

    Args:
        facts: The store metadata.
        writer: The writer, which has all shards.
        output: The store's folder.
        seconds: Duration of the preparation, for the log.

    Returns:
        The description of the store.

    Raises:
        UserError: No sample was kept.
    """
    notes = (writer.notes(index) for index in range(facts.num_shards))
    lengths = shard_lengths([writer.shard_file(index) for index in range(facts.num_shards)], writer.modalities)
    report = build_report(facts.num_lines, facts.rejected, notes, lengths)
    report["groups_across_splits"] = facts.groups_across_splits
    if not report["kept"]:
        first = report["skipped_samples"][0]
        raise UserError(f'{output}: no sample could be used; "{first["id"]}": {first["reason"]}')
    write_json(output / REPORT_FILE, report)
    with atomic_file(output / LENGTHS_FILE) as temporary:
        draw_lengths(lengths, temporary, writer.units)
    labels = {}
    if facts.image_labels is not None:
        extractor = facts.extractors["image"]
        labels[IMAGE_LABELS] = label_shards(writer, facts.num_shards, facts.image_labels, extractor, facts.split_names)
    description = writer.finish(facts.num_shards, extractors=labels)
    _LOG.info(f"{output}: a feature store of {report['kept']} samples, in {seconds:.0f} s (see {REPORT_FILE}, {LENGTHS_FILE})")
    for line in report_table(report, facts.limits, writer.units):
        _LOG.info(line)
    if facts.groups_across_splits:
        _LOG.info(f"  note: {facts.groups_across_splits} groups are in several splits, as in the manifest")
    return description


def part_folder(output: Path, index: int, count: int) -> Path:
    """Return the folder of partition `index` of `count` of the store `output`."""
    return output.with_name(f"{output.name}.part-{index}-of-{count}")


def parse_partition(text: str) -> tuple[int, int]:
    """Parse "2/16" to (2, 16). Raise UserError for anything but i/n with 0 <= i < n."""
    index, slash, count = text.partition("/")
    if not (slash and text.isascii() and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f'--partition "{text}": write i/n with i from 0 to n - 1, such as 0/16')
    return int(index), int(count)


def finish_part(facts: StoreMetadata, folder: Path, partition: tuple[int, int], seconds: float) -> None:
    """Mark a partition as complete.

    Args:
        facts: The store metadata.
        folder: The partition's folder.
        partition: (i, n) for partition i of n.
        seconds: Duration of its preparation.
    """
    write_json(
        folder / PART_FILE, {"index": partition[0], "count": partition[1], "seconds": seconds, "facts": facts.as_dict()}
    )


def is_finished_part(folder: Path, key: str) -> bool:
    """Return whether the partition is complete and was made from these inputs and settings."""
    return (folder / PART_FILE).is_file() and _read_part(folder)["facts"]["key"] == key


def merge_parts(output: Path) -> StoreDescription:
    """Merge the partitions next to `output` into the store `output`, and remove them.

    An interrupted merge can be resumed. Raise UserError if a partition is missing or unfinished, or if partitions have
    different inputs.
    """
    with exclusive_use(output):
        folders = sorted(output.parent.glob(f"{output.name}.part-*-of-*"))
        if (output / STORE_FILE).is_file():
            description = load_description(output)
            _check_merged(output, description, folders)
            _LOG.info(f"{output}: already a feature store")
        else:
            parts = _complete_set(output, folders)
            facts = StoreMetadata.from_dict(parts[0]["facts"])
            writer = facts.writer(output, folders[0] / TOKENIZER_FOLDER)
            for file in folders[0].glob(CLUSTER_FILES):
                shutil.copyfile(file, output / file.name)
            for folder in folders:
                _check_shards(folder)
            for folder in folders:
                _take_shards(folder, output)
            missing = [index for index in range(facts.num_shards) if not writer.has_shard(index)]
            if missing:
                raise UserError(f"{output}: shard {missing[0]} is in none of the partitions: prepare its partition again")
            description = finish_store(facts, writer, output, sum(part["seconds"] for part in parts))
        for folder in folders:
            _remove_part(folder)
        return description


def _check_merged(output: Path, description: StoreDescription, folders: list[Path]) -> None:
    """Raise UserError unless the folders are left over from a merge into the existing store."""
    for folder in folders:
        if any(folder.iterdir()) and not is_finished_part(folder, description.preparation_key):
            raise UserError(
                f"{output}: another finished feature store is there, {folder.name} is not a partition of it: remove either"
            )


def _remove_part(folder: Path) -> None:
    """Remove a partition, `part.json` last: it identifies whatever is left."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != PART_FILE:
            entry.unlink()
    shutil.rmtree(folder)


def _complete_set(output: Path, folders: list[Path]) -> list[dict[str, Any]]:
    if not folders:
        raise UserError(
            f"{output}: no partitions next to it ({output.name}.part-…): write them with opt-ds prepare --partition i/n"
        )
    unfinished = [folder for folder in folders if not (folder / PART_FILE).is_file()]
    if unfinished:
        raise UserError(f"{unfinished[0]}: unfinished: run its opt-ds prepare --partition again, it resumes")
    parts = [_read_part(folder) for folder in folders]
    for folder, part in zip(folders, parts, strict=True):
        if part["count"] != parts[0]["count"] or part["facts"] != parts[0]["facts"]:
            raise UserError(f"{folder}: other inputs, settings or partitions than {folders[0].name}: remove one of them")
    absent = sorted(set(range(parts[0]["count"])) - {part["index"] for part in parts})
    if absent:
        raise UserError(
            f"{output}: partition {absent[0]} of {parts[0]['count']} missing: opt-ds prepare --partition {absent[0]}/…"
        )
    return parts


def _check_shards(folder: Path) -> None:
    """Check the shards of a partition.

    It may have been copied from another machine, where damaged shards must be detected.
    """
    for journal in sorted(folder.glob("shard-*.json")):
        shard = _shard_of(journal)
        file = folder / shard.file
        if file.is_file() and file_sha256(file) != shard.sha256:
            raise UserError(
                f"{file}: damaged since it was made: remove {folder} and run its opt-ds prepare --partition again"
            )


def _take_shards(folder: Path, output: Path) -> None:
    """Move each shard, then its journal, since a shard counts only with its journal."""
    for journal in sorted(folder.glob("shard-*.json")):
        shard = _shard_of(journal).file
        if (folder / shard).is_file():
            (folder / shard).replace(output / shard)
        journal.replace(output / journal.name)


def _read_part(folder: Path) -> dict[str, Any]:
    remedy = f"remove {folder} and run its opt-ds prepare --partition again"
    part = read_json_object(folder / PART_FILE, remedy)
    kinds: dict[str, type | tuple[type, ...]] = {"index": int, "count": int, "seconds": (int, float), "facts": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(part.get(name), kind)]
    if wrong or {*part["facts"], "further", "image_labels"} != {field.name for field in fields(StoreMetadata)}:
        raise UserError(f"{folder / PART_FILE}: damaged, field {wrong[0] if wrong else 'facts'}: {remedy}")
    return part


def _shard_of(journal: Path) -> ShardDescription:
    remedy = f"remove {journal.parent} and run its opt-ds prepare --partition again"
    try:
        return ShardDescription.model_validate(read_json_object(journal, remedy).get("shard"))
    except ValidationError:
        raise UserError(f"{journal}: damaged: {remedy}") from None
