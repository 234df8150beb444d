"""Tokenise the texts of a finished store again, with another tokenizer or with other texts. Everything else is kept.

The new tokenizer is next to the old one, under another name, until `store.json` names it, so a kill leaves one valid
store.
"""

import hashlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.features.text import TextExtractor, copy_tokenizer, normalise_unicode, train_wordpiece
from opt_ds.ingest.manifest import read_manifest
from opt_ds.ingest.report import ModalityNotes, refresh_report
from opt_ds.ingest.settings import PrepareSettings
from opt_ds.ingest.update import refuse_empty, sample_lines
from opt_ds.store.files import exclusive_use
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import MISSING, MODALITIES, TOKENIZER_FOLDER, StoreDescription
from opt_ds.store.shards import join_items, join_strings
from opt_ds.store.statistics import TRAIN_SPLIT
from opt_ds.store.tokenizer import describe_tokenizer
from opt_ds.store.update import Arrays, remove_unlisted, rewrite_shards
from opt_ds.store.verify import open_store

_LOG = logging.getLogger(__name__)
_TEXT = MODALITIES.index("text")
_REVISION = re.compile(rf"^{TOKENIZER_FOLDER}(?:-r(\d+))?$")


@dataclass(frozen=True)
class _Text:
    """The text of a sample. Samples with equal keys share its row."""

    key: Any
    string: str


def update_text(
    path: Path,
    manifest_path: Path | None,
    settings: PrepareSettings,
    *,
    strict: bool = False,
    allow_outside: bool = False,
) -> StoreDescription:
    """Tokenise every text again: the store's own captions, or the texts of a manifest for the ids of the samples.

    The tokenizer is `settings.text`, or one of `vocab_size` trained on the train split. `unicode_form` and `max_tokens`
    apply as in preparation. A sample whose text has no tokens, or whose line has no text, is left without text and
    logged.

    Args:
        path: The store's folder.
        manifest_path: A manifest with the texts. None: use the store's captions.
        settings: The settings of the tokenizer.
        strict: Stop at the first sample that would be left without text.
        allow_outside: See `read_manifest`.

    Returns:
        The new description of the store.

    Raises:
        UserError: A sample is not in the manifest or would be left without any modality, or a tokenizer is to be
            trained and no train sample has a text.
    """
    with exclusive_use(path):
        store = open_store(path)
        texts = _own_texts(store) if manifest_path is None else _manifest_texts(store, manifest_path, allow_outside)
        if not any(texts):
            raise UserError(f"{manifest_path or path}: no sample has a text")
        remove_unlisted(path, store.description)
        folder = path / _next_name(store.description.tokenizer_folder)
        _make_tokenizer(store, texts, settings, folder)
        extractor = TextExtractor(folder, settings.unicode_form)
        tokenizer, vocab_size = describe_tokenizer(folder)
        splits = [store.description.split_names[code] for code in store.split_codes.tolist()]
        notes = ModalityNotes("text")
        starts = np.cumsum([0, *(shard.num_samples for shard in store.description.shards)])

        def change(index: int, arrays: Arrays) -> Arrays:
            samples = range(starts[index], starts[index + 1])
            changed = _tokenised(store, samples, texts, splits, arrays, extractor, settings.max_tokens, notes)
            if strict and notes.dropped:
                raise UserError(
                    f'sample "{notes.dropped[0]["id"]}": {notes.dropped[0]["reason"]} (--strict stops at the first)'
                )
            refuse_empty(store, list(samples), changed["samples/rows"])
            return changed

        def fields() -> dict[str, Any]:
            return {
                "dims": store.description.dims.model_copy(update={"vocab_size": vocab_size}),
                "extractors": {**store.description.extractors, "text": extractor.fingerprint()},
                "tokenizer": tokenizer,
                "tokenizer_folder": folder.name,
                "preparation_key": "",
            }

        try:
            description = rewrite_shards(store, change, fields, new_statistics=False, new_tokenizer=folder.name)
        except BaseException:
            shutil.rmtree(folder)
            raise
        refresh_report(path, description, notes)
        rows, truncated = sum(shard.num_texts for shard in description.shards), len(notes.truncated)
        _LOG.info(
            f"{path}: {rows} texts by a tokenizer of {vocab_size}, {truncated} truncated; {len(notes.dropped)} samples left "
            "without"
        )
        for line in notes.shown():
            _LOG.info(line)
        return description


def _own_texts(store: FeatureStore) -> list[_Text | None]:
    rows = store.rows[:, _TEXT].tolist()
    return [None if row == MISSING else _Text(row, store.caption(row)) for row in rows]


def _manifest_texts(store: FeatureStore, manifest_path: Path, allow_outside: bool) -> list[_Text | None]:
    further = tuple(store.description.further)
    manifest = read_manifest(manifest_path, allow_outside=allow_outside, further=further)
    lines = sample_lines(store, manifest)
    return [None if line.text is None else _Text(line.id, line.text) for line in lines]


def _make_tokenizer(store: FeatureStore, texts: list[_Text | None], settings: PrepareSettings, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if settings.text is not None:
            copy_tokenizer(settings.text, temporary)
        else:
            train = set(store.split_samples(TRAIN_SPLIT).tolist())
            strings = {text.key: text.string for sample, text in enumerate(texts) if text is not None and sample in train}
            if not strings:
                raise UserError(
                    f'{store.path}: no text is in split "{TRAIN_SPLIT}", on which the tokenizer is trained: '
                    "give a tokenizer with --weights"
                )
            captions = [normalise_unicode(string, settings.unicode_form) for string in strings.values()]
            train_wordpiece(captions, settings.vocab_size, temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenised(
    store: FeatureStore,
    samples: range,
    texts: list[_Text | None],
    splits: list[str],
    arrays: Arrays,
    extractor: TextExtractor,
    max_tokens: int | None,
    notes: ModalityNotes,
) -> Arrays:
    """Return the arrays of a shard with its texts tokenised again.

    Record truncated texts, missing texts and duplicates in `notes`.
    """
    first: dict[Any, int] = {}  # key -> the first sample that uses it
    for sample in samples:
        if (text := texts[sample]) is not None:
            first.setdefault(text.key, sample)
    strings = {key: text.string for key, sample in first.items() if (text := texts[sample]) is not None}
    tokens_of = dict(zip(strings, extractor.extract(list(strings.values())), strict=True))
    row_of: dict[Any, int] = {}
    for key, tokens in tokens_of.items():
        if not len(tokens):
            continue
        id = store.sample_id(first[key])
        row_of[key] = len(row_of)
        if max_tokens is not None and len(tokens) > max_tokens:
            notes.truncated.append(id)
        digest = hashlib.blake2b(strings[key].encode(), digest_size=8).hexdigest()
        notes.digests.append((digest, splits[first[key]], id))
    rows = arrays["samples/rows"].copy()
    for place, sample in enumerate(samples):
        text = texts[sample]
        rows[place, _TEXT] = MISSING if text is None else row_of.get(text.key, MISSING)
        if text is None and arrays["samples/rows"][place, _TEXT] != MISSING:
            notes.dropped.append({"id": store.sample_id(sample), "reason": "the manifest names no text"})
        elif text is not None and text.key not in row_of:
            notes.dropped.append({"id": store.sample_id(sample), "reason": "the text has no tokens"})
    tokens, offsets = join_items([tokens_of[key][:max_tokens] for key in row_of], (0,))
    utf8, utf8_offsets = join_strings([strings[key] for key in row_of])
    new = {"text/tokens": tokens.astype("int32"), "text/offsets": offsets, "text/utf8": utf8.astype("uint8"),
           "text/utf8_offsets": utf8_offsets}  # fmt: skip
    return {**arrays, "samples/rows": rows, **new}


def _next_name(folder: str) -> str:
    match = _REVISION.match(folder)
    assert match is not None, f"{folder} is not a tokenizer's folder"
    return f"{TOKENIZER_FOLDER}-r{int(match[1] or 0) + 1}"
