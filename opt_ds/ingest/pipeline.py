"""Manifest to feature store. Workers decode and extract; the main process tokenises and writes shard after shard.

The bytes written depend only on the manifest, the extractors and the settings, not on the number of workers. Work is
divided into fixed chunks (see workers.py), and results are taken in order.
"""

import hashlib
import json
import logging
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from opt_ds.decoding.decoder import EnvironmentFaultError
from opt_ds.decoding.decoder_process import FAULTS
from opt_ds.decoding.tar_members import file_on_disk
from opt_ds.devices import choose_device
from opt_ds.errors import UserError
from opt_ds.features.extractors import ExtractorChoice
from opt_ds.features.text import TextExtractor, copy_tokenizer, normalise_unicode, train_wordpiece
from opt_ds.former_names import former_arguments
from opt_ds.ingest.file_features import Extracted, Failure
from opt_ds.ingest.finish import PART_FILE, StoreMetadata, finish_part, finish_store, is_finished_part, part_folder
from opt_ds.ingest.image_labels import LabelSource, label_source
from opt_ds.ingest.manifest import Manifest, groups_across_splits, read_manifest
from opt_ds.ingest.retry import forget_skipped, notice_changes, reopen, skipped_files_of_shards, skipped_files_of_store
from opt_ds.ingest.settings import PrepareSettings
from opt_ds.ingest.workers import ShardFiles, extraction
from opt_ds.store.files import exclusive_use, file_sha256, is_disk_full
from opt_ds.store.schema import MISSING, MODALITIES, STORE_FILE, Dims, StoreDescription, load_description
from opt_ds.store.statistics import TRAIN_SPLIT
from opt_ds.store.writer import PARTIAL_FILE, SampleItem, ShardContent, StoreWriter, TextItem
from opt_ds.version import __version__

_LOG = logging.getLogger(__name__)


@former_arguments(share="partition")
def prepare(
    manifest_path: Path,
    output: Path,
    settings: PrepareSettings | None = None,
    *,
    workers: int = 2,
    device: str = "auto",
    strict: bool = False,
    limit: int | None = None,
    allow_outside: bool = False,
    info: dict[str, Any] | None = None,
    partition: tuple[int, int] | None = None,
    retry_skipped: bool = False,
) -> StoreDescription | None:
    """Make the feature store `output` from a manifest. Resume an unfinished one of the same inputs and settings.

    A finished store of the same inputs is returned unchanged. A sample that cannot be used is skipped and listed in the
    store's report.json. An interrupted call can be repeated and resumes.

    Args:
        manifest_path: The manifest.
        output: The store's folder.
        settings: How features are extracted. None: the defaults.
        workers: Number of worker processes.
        device: "auto", "cpu" or "cuda".
        strict: Stop at the first sample that cannot be used.
        limit: Use only this many samples.
        allow_outside: See `read_manifest`.
        info: Additional entries of `info` in store.json.
        partition: (i, n): make only partition i of n (i from 0), in its own folder next to `output`. When all n
            partitions exist, `merge_parts` makes the same store from them as one call without `partition`.
        retry_skipped: Try samples again whose files an earlier call skipped. The result is the same store as if their
            files had been readable at once.

    Returns:
        The description of the store; None for a partition.

    Raises:
        UserError: A manifest, setting, checkpoint or output is invalid (before any feature is computed), or the disk is
            full.
        RunError: Worker processes are killed again and again, for example because memory is full.
        EnvironmentFaultError: A file cannot be read for a reason outside it, such as its permissions. Nothing is
            skipped for that.
    """
    started = time.monotonic()
    settings = settings or PrepareSettings()
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    folder = output if partition is None else part_folder(output, *partition)
    further = sorted(settings.extractors)
    manifest = read_manifest(manifest_path, limit=limit, strict=strict, allow_outside=allow_outside, further=further)
    chosen_device = choose_device(device)
    try:
        with exclusive_use(folder):
            return _prepare(
                manifest, folder, settings, workers, chosen_device, strict, info, partition, retry_skipped, started
            )
    except EnvironmentFaultError as fault:
        raise EnvironmentFaultError(f"{fault}; what is done is kept, and the same command resumes") from None
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"{folder}: the disk is full: free space and run the same command again, it resumes"
            ) from None
        raise


def _prepare(
    manifest: Manifest,
    output: Path,
    settings: PrepareSettings,
    workers: int,
    device: str,
    strict: bool,
    info: dict[str, Any] | None,
    partition: tuple[int, int] | None,
    retry_skipped: bool,
    started: float,
) -> StoreDescription | None:
    choices = {kind: settings.extractor(kind).settled(_files(manifest, kind)) for kind in settings.file_kinds}
    named = ", ".join(choice.given for choice in choices.values())
    _LOG.info(f"device: {device}; extractors: {named}; workers: {workers}")
    extractors: dict[str, Any] = {kind: choice.build(device) for kind, choice in choices.items()}
    fingerprints = {kind: choice.complete_fingerprint(extractors[kind]) for kind, choice in choices.items()}
    labels = _label_source(manifest, settings, choices["image"].given, extractors["image"], fingerprints["image"])
    if settings.trim_silence:
        fingerprints["audio"]["trim_silence"] = True  # serving must trim the audio too
    key = _preparation_key(manifest, settings, fingerprints, labels)
    if (output / STORE_FILE).exists():
        description = load_description(output)
        if description.preparation_key != key:
            raise UserError(f"{output}: another finished feature store is there: choose another --output or remove it")
        if not (retry_skipped and reopen(output, description, manifest, settings)):
            _LOG.info(f"{output}: already prepared from this manifest and these settings (kept files are not compared)")
            notice_changes(manifest, skipped_files_of_store(output))
            return description
    elif retry_skipped and forget_skipped(output):
        (output / PART_FILE).unlink(missing_ok=True)
    if partition is not None and is_finished_part(output, key):
        _LOG.info(f"{output}: this partition is already prepared from these inputs")
        notice_changes(manifest, skipped_files_of_shards(output))
        return None
    if (output / PARTIAL_FILE).exists():
        notice_changes(manifest, skipped_files_of_shards(output))
    _check_files(manifest, strict)
    if TRAIN_SPLIT not in manifest.splits:
        _LOG.warning(f'{manifest.path}: no sample is in split "{TRAIN_SPLIT}", so features have no mean and deviation')

    text_extractor = _tokenizer(manifest, settings, output)
    fingerprints["text"] = text_extractor.fingerprint()
    dims = Dims(
        image_feature_dim=extractors["image"].dim,
        image_num_classes=extractors["image"].num_classes if labels is None else labels.num_classes,
        audio_feature_dim=extractors["audio"].dim,
        audio_frame_rate_hz=extractors["audio"].frame_rate_hz / settings.pool_frames,
        vocab_size=text_extractor.dim,
    )
    facts = StoreMetadata(
        dims=dims,
        split_names=manifest.split_names,
        splits_source=manifest.splits_source,
        extractors=fingerprints,
        label_names=manifest.label_names,
        info={"created_by": f"opt_ds {__version__}", "manifest_sha256": manifest.sha256, **(info or {})},
        key=key,
        compression=settings.compression,
        num_shards=len(manifest.shards(settings.samples_per_shard)),
        num_lines=len(manifest.lines),
        groups_across_splits=groups_across_splits(manifest),
        rejected=[asdict(entry) for entry in manifest.rejected],
        limits={"max_tokens": settings.max_tokens, "max_frames": settings.max_frames},
        further={kind: extractors[kind].modality() for kind in manifest.further},
        image_labels=None if labels is None else labels.identity,
    )
    writer = facts.writer(output, _staging(output))
    if labels is not None and labels.clusters is not None:
        labels.clusters.save(output)
    del extractors  # the workers build their own
    _extract_shards(manifest, choices, settings, writer, text_extractor, workers, device, strict, partition or (0, 1))
    seconds = round(time.monotonic() - started, 1)
    shutil.rmtree(_staging(output))
    if partition is None:
        return finish_store(facts, writer, output, seconds)
    finish_part(facts, output, partition, seconds)
    _LOG.info(f"{output}: done; when all {partition[1]} partitions are done: opt-ds merge")
    return None


def _files(manifest: Manifest, kind: str) -> Iterator[Path]:
    """Yield the files of a modality in the order of the manifest."""
    yield from (manifest.folder / name for line in manifest.lines if (name := line.file(kind)) is not None)


def _label_source(
    manifest: Manifest, settings: PrepareSettings, given: str, extractor: Any, fingerprint: dict[str, Any]
) -> LabelSource | None:
    """Return the source of region labels; None for the classes of the extractor. Log what that means for MRC."""
    has_images, has_classes = any(line.image is not None for line in manifest.lines), extractor.num_classes >= 2
    if settings.image_labels is None:
        if has_images and not has_classes:
            _LOG.info(
                f"{given}: its image regions have no classes, so training disables MRC (--image-labels kmeans:1024 makes some)"
            )
        return None
    if not has_images:
        raise UserError(f"--image-labels {settings.image_labels}: {manifest.path} names no images: leave it out")
    if has_classes:
        _LOG.warning(f"--image-labels {settings.image_labels} replaces the {extractor.num_classes} classes of {given}")
    source = label_source(settings.image_labels, "--image-labels", fingerprint, extractor.dim)
    pairs = zip(manifest.lines, manifest.splits, strict=True)
    if source.clusters is None and not any(split == TRAIN_SPLIT and line.image is not None for line, split in pairs):
        raise UserError(
            f'--image-labels {settings.image_labels}: no image is in split "{TRAIN_SPLIT}", whose regions are clustered: name '
            "the folder of a store whose clusters are taken"
        )
    return source


def _preparation_key(
    manifest: Manifest, settings: PrepareSettings, fingerprints: dict[str, Any], labels: LabelSource | None
) -> str:
    text = None
    if settings.text is not None:
        if not settings.text.is_dir():
            raise UserError(f"--text {settings.text}: no such folder")
        file = next(
            (settings.text / name for name in ("tokenizer.json", "vocab.txt") if (settings.text / name).is_file()), None
        )
        text = file_sha256(file) if file else None
    own = {} if labels is None else {"image_labels": labels.identity}
    content = [manifest.sha256, {**settings.hashed(), "text": text, **own}, fingerprints]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_files(manifest: Manifest, strict: bool) -> None:
    for kind in manifest.file_kinds:
        names = {name for line in manifest.lines if (name := line.file(kind)) is not None}
        missing = sorted(name for name in names if not _is_file(file_on_disk(manifest.folder / name)))
        if missing and (strict or len(missing) == len(names)):
            first = file_on_disk(manifest.folder / missing[0])
            raise UserError(
                f"{manifest.path}: {len(missing)} of {len(names)} {kind} files are missing, the first is {first}: "
                "paths are relative to the manifest"
            )


def _is_file(path: Path) -> bool:
    """Return whether it is a file.

    If it cannot be checked (permissions, a lost mount), return True: the decoder reports that.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError) as error:
        return isinstance(error, OSError) and error.errno in FAULTS


def _staging(output: Path) -> Path:
    return output.with_name(f".{output.name}.tokenizer")


def _tokenizer(manifest: Manifest, settings: PrepareSettings, output: Path) -> TextExtractor:
    """Copy or train the tokenizer next to the output, from where the writer copies it, and return its extractor."""
    folder = _staging(output)
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted run may have left files that another --text lacks
    if settings.text is not None:
        copy_tokenizer(settings.text, folder)
    else:
        pairs = zip(manifest.lines, manifest.splits, strict=True)
        captions = [
            normalise_unicode(line.text, settings.unicode_form)
            for line, split in pairs
            if line.text is not None and split == TRAIN_SPLIT
        ]
        if not captions and any(line.text is not None for line in manifest.lines):
            raise UserError(
                f'{manifest.path}: no text is in split "{TRAIN_SPLIT}", on which the tokenizer is trained: '
                f'name the split "{TRAIN_SPLIT}", or give a tokenizer with --text'
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        train_wordpiece(captions, settings.vocab_size, folder)
    return TextExtractor(folder, settings.unicode_form)


def _extract_shards(
    manifest: Manifest,
    choices: Mapping[str, ExtractorChoice],
    settings: PrepareSettings,
    writer: StoreWriter,
    text_extractor: TextExtractor,
    workers: int,
    device: str,
    strict: bool,
    partition: tuple[int, int],
) -> None:
    own, of = partition
    shards = [ShardFiles(index, lines) for index, lines in enumerate(manifest.shards(settings.samples_per_shard))]
    todo = [shard for shard in shards if shard.index % of == own and not writer.has_shard(shard.index)]
    for shard in todo:
        for kind in manifest.file_kinds:
            wanted = (manifest.lines[line].file(kind) for line in shard.lines)
            shard.files[kind] = list(dict.fromkeys(name for name in wanted if name is not None))
    total = sum(len(files) for shard in todo for files in shard.files.values())
    with (
        extraction(todo, manifest.folder, choices, settings, workers, device) as results,
        tqdm(total=total, unit="file", desc="features", dynamic_ncols=True) as progress,
    ):
        for shard in todo:
            items: dict[str, dict[str, Any]] = {kind: {} for kind in manifest.file_kinds}
            while sum(map(len, items.values())) < sum(map(len, shard.files.values())):
                kind, names, values = next(results)
                items[kind].update(zip(names, values, strict=True))
                progress.update(len(names))
                if strict and any(isinstance(value, Failure) for value in values):
                    break  # with --strict no further file is read
            content, notes = _assemble(manifest, shard.lines, items, text_extractor, settings.max_tokens)
            if strict and notes["skipped"]:
                first = notes["skipped"][0]
                raise UserError(f'sample "{first["id"]}": {first["reason"]} (--strict stops at the first)')
            writer.write_shard(shard.index, content, notes=notes)


def _assemble(
    manifest: Manifest,
    lines: list[int],
    items: dict[str, dict[str, Any]],
    text_extractor: TextExtractor,
    max_tokens: int | None,
) -> tuple[ShardContent, dict[str, Any]]:
    """Assemble a shard. Return its content and its notes for the report (see report.py).

    Lines that name the same file share its row. Files that were not extracted, because the run is stopping, are
    ignored.
    """
    kinds = manifest.file_kinds
    content = ShardContent(further={kind: [] for kind in manifest.further})
    skipped: list[dict[str, str]] = []
    files: dict[str, Any] = {}
    truncated: dict[str, list[str]] = {"text": [], "audio": []}
    rows: dict[str, dict[str, int]] = {kind: {} for kind in kinds}
    digests: dict[str, list[list[str]]] = {kind: [] for kind in ("text", *kinds)}
    targets: dict[str, list[Any]] = {"image": content.images, "audio": content.audios, **content.further}
    for index in lines:
        line, split = manifest.lines[index], manifest.splits[index]
        parts = {kind: items[kind][name] for kind, name in line.files().items() if name in items[kind]}
        tokens = text_extractor.extract([line.text])[0] if line.text is not None else None
        reason = next((part.reason for part in parts.values() if isinstance(part, Failure)), None)
        if reason is None and tokens is not None and not len(tokens):
            reason = "the text has no tokens"
        if reason is not None:
            skipped.append({"id": line.id, "reason": reason})
            files |= {line.files()[kind]: part.state for kind, part in parts.items() if isinstance(part, Failure)}
            continue
        sample_rows = dict.fromkeys((*MODALITIES, *manifest.further), MISSING)
        for kind, part in parts.items():
            assert isinstance(part, Extracted)
            row = rows[kind].setdefault(line.files()[kind], len(targets[kind]))
            if row == len(targets[kind]):
                targets[kind].append(part.item)
                digests[kind].append([part.digest, split, line.id])
                if part.was_truncated:
                    truncated[kind].append(line.id)
            sample_rows[kind] = row
        if tokens is not None and line.text is not None:
            if max_tokens is not None and len(tokens) > max_tokens:
                truncated["text"].append(line.id)
                tokens = tokens[:max_tokens]
            sample_rows["text"] = len(content.texts)
            content.texts.append(TextItem(tokens, line.text))
            digests["text"].append([hashlib.blake2b(line.text.encode(), digest_size=8).hexdigest(), split, line.id])
        content.samples.append(SampleItem(line.id, tuple(sample_rows.values()), line.group_name, split, line.labels))
    notes = {"skipped": skipped, "truncated": truncated, "digests": digests}
    return content, {**notes, "files": files} if files else notes
