"""Write a feature store shard by shard.

Shards are written atomically, `store.json` last, and a killed run can be resumed.

Shape letters: N samples, L tokens, R regions, T frames; Dv, Da feature sizes; M modalities.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.checks import audio_problem, codes_problem, further_problem, image_problem, pixels_problem, text_problem
from opt_ds.store.files import atomic_file, file_sha256, remove_leftovers, write_json
from opt_ds.store.foreign import is_plain_name, read_json_object
from opt_ds.store.index import ShardFile, write_index
from opt_ds.store.schema import (
    BOX_SIZE,
    CODES_PER_IMAGE,
    MISSING,
    MODALITIES,
    OPTIONAL_DATASETS,
    PIXELS_SHAPE,
    SCHEMA_VERSION,
    STORE_FILE,
    TOKENIZER_FOLDER,
    Dims,
    FurtherModality,
    ShardDescription,
    StoreDescription,
    check_further,
    datasets_of,
    group_code,
    units_of,
)
from opt_ds.store.shards import describe_shard, join_columns, join_items, join_strings, write_datasets
from opt_ds.store.statistics import TRAIN_SPLIT, statistics_of, summed_datasets, train_sums
from opt_ds.store.tokenizer import describe_tokenizer

PARTIAL_FILE = "partial.json"


@dataclass(frozen=True)
class TextItem:
    """A caption: `tokens` int [L] without [CLS] and [SEP], and the string that they were made from."""

    tokens: np.ndarray
    string: str


@dataclass(frozen=True)
class ImageItem:
    """An image.

    `features` is [R, Dv], `boxes` [R, 7] in 0..1, `labels` [R], `scores` [R], `pixels` uint8 [3, 64, 64], `codes` [64].
    """

    features: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    pixels: np.ndarray | None = None
    codes: np.ndarray | None = None


@dataclass(frozen=True)
class SampleItem:
    """One sample. `rows` are M indices into the shard's lists of texts, images, audios and further items; -1 for none."""

    id: str
    rows: tuple[int, ...]
    group: str
    split: str
    labels: Sequence[str] = ()


@dataclass
class ShardContent:
    """The content of one shard, in memory.

    `audios` are frames [T, Da]. `further` holds the rows of each further modality: a row is an array per column.
    """

    samples: list[SampleItem] = field(default_factory=list)
    texts: list[TextItem] = field(default_factory=list)
    images: list[ImageItem] = field(default_factory=list)
    audios: list[np.ndarray] = field(default_factory=list)
    further: dict[str, list[dict[str, np.ndarray]]] = field(default_factory=dict)


_Item = TextItem | ImageItem | np.ndarray | dict[str, np.ndarray]


class StoreWriter:
    """Writes shards in any order, then `store.json`.

    Opening an unfinished store with the same `key` resumes it. An unfinished store with another key, or a finished
    store, is a UserError.

    Args:
        path: The store's folder.
        dims: Sizes of features and vocabulary.
        split_names: Names of the splits.
        splits_source: Origin of the splits.
        extractors: Fingerprints of the extractors.
        tokenizer_folder: The tokenizer, which is copied into the store.
        label_names: All labels that samples may have.
        info: Additional entries of `info` in store.json.
        key: Identifies the inputs of the store.
        train_split: The split that the feature statistics are computed over.
        compression: Compression of the shards.
        further: The modalities besides text, image and audio, in the order of their columns of samples/rows.
    """

    def __init__(
        self,
        path: Path,
        *,
        dims: Dims,
        split_names: Sequence[str],
        splits_source: Literal["manifest", "group hash"],
        extractors: dict[str, dict[str, Any]],
        tokenizer_folder: Path,
        label_names: Sequence[str] = (),
        info: dict[str, Any] | None = None,
        key: str = "",
        train_split: str = TRAIN_SPLIT,
        compression: Literal["gzip"] | None = None,
        further: Mapping[str, FurtherModality] | None = None,
    ) -> None:
        self.path = path
        self._dims = dims
        self._further = dict(further or {})
        check_further(self._further, str(path))
        self._split_codes = {name: code for code, name in enumerate(split_names)}
        self._label_codes = {name: code for code, name in enumerate(label_names)}
        self._splits_source = splits_source
        self._extractors = extractors
        self._info = info or {}
        self._key = key
        self._train_split = train_split
        self._compression = compression
        self._begin(tokenizer_folder)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities in the order of `SampleItem.rows`."""
        return (*MODALITIES, *self._further)

    @property
    def units(self) -> dict[str, str]:
        """Plural word for the items of each modality."""
        return units_of(self._further)

    def has_shard(self, index: int) -> bool:
        """Return whether this shard is complete, written now or by an earlier run that was stopped."""
        journal = self._journal(index)
        if not journal.is_file():
            return False
        fields = _read_journal(journal)
        file = self.path / fields["shard"]["file"]
        return file.is_file() and file.stat().st_size == fields["shard"]["bytes"]

    def write_shard(self, index: int, content: ShardContent, *, notes: dict[str, Any] | None = None) -> None:
        """Write shard `index`. Raise UserError, naming the sample, for an item that `inspect` would refuse.

        `notes` (JSON) are kept next to the shard until `finish`, so that a resumed run still has them.
        """
        if (problem := self._problem(content)) is not None:
            raise UserError(f"{self.path}: {problem}: not written, as `opt-ds inspect` would refuse it")
        file = self.path / self.shard_name(index)
        arrays = self._arrays(content)
        with atomic_file(file) as temporary:
            write_datasets(temporary, arrays, compression=self._compression, datasets=datasets_of(self._further))
        shard = describe_shard(file, arrays, self._further)
        splits = list(self._split_codes)
        write_json(self._journal(index), _journal_of(shard, arrays, splits, notes or {}, self._train_split, self._further))

    def replace_labels(self, index: int, labels: np.ndarray) -> None:
        """Replace the classes of the image regions, int16 [R], of a written shard. Its notes are kept.

        A call that was interrupted can be repeated.
        """
        journal = _read_journal(self._journal(index))
        path = self.shard_file(index)
        file = ShardFile(path)
        if np.array_equal(file.array("image/labels")[:], labels) and file_sha256(path) == journal["shard"]["sha256"]:
            return
        datasets = datasets_of(self._further)
        arrays = {name: np.asarray(file.array(name)[:]) for name in file.names()}
        arrays["image/labels"] = labels.astype(datasets["image/labels"], copy=False)
        with atomic_file(path) as temporary:
            write_datasets(temporary, arrays, compression=self._compression, datasets=datasets)
        shard = describe_shard(path, arrays, self._further)
        write_json(self._journal(index), {**journal, "shard": shard.model_dump()})

    @staticmethod
    def shard_name(index: int) -> str:
        """Return the file name of a shard when it is first written."""
        return f"shard-{index:05d}.h5"

    def shard_file(self, index: int) -> Path:
        """Return the file of a written shard, before `finish`."""
        return self.path / _read_journal(self._journal(index))["shard"]["file"]

    def notes(self, index: int) -> dict[str, Any]:
        """Return the notes of a written shard, before `finish`."""
        return _read_journal(self._journal(index))["notes"]

    def finish(
        self, num_shards: int, *, info: dict[str, Any] | None = None, extractors: dict[str, dict[str, Any]] | None = None
    ) -> StoreDescription:
        """Write `store.json` over shards 0..num_shards-1 and remove the journals.

        All these shards must have been written. `extractors` are further fingerprints.
        """
        journals = [_read_journal(self._journal(index)) for index in range(num_shards)]
        shards = [ShardDescription(**journal["shard"]) for journal in journals]
        split_counts = np.sum([journal["split_counts"] for journal in journals], axis=0, dtype=int)
        tokenizer, _ = describe_tokenizer(self.path / TOKENIZER_FOLDER)
        with_images = [journal for journal in journals if journal["shard"]["num_images"]]
        description = StoreDescription(
            schema_version=SCHEMA_VERSION,
            num_samples=sum(shard.num_samples for shard in shards),
            split_names=list(self._split_codes),
            split_counts=dict(zip(self._split_codes, split_counts.tolist(), strict=True)),
            splits_source=self._splits_source,
            dims=self._dims,
            has_codes=bool(with_images) and all(journal["has_codes"] for journal in with_images),
            has_pixels=bool(with_images) and all(journal["has_pixels"] for journal in with_images),
            compression=self._compression,
            extractors={**self._extractors, **(extractors or {})},
            tokenizer=tokenizer,
            label_names=list(self._label_codes),
            statistics=statistics_of([journal["sums"] for journal in journals], self._dims, self._further),
            shards=shards,
            further=self._further,
            preparation_key=self._key,
            info={**self._info, **(info or {})},
        ).with_fingerprint()
        write_index(self.path, description)
        write_json(self.path / STORE_FILE, description.model_dump(mode="json"))
        for leftover in [*self.path.glob("shard-*.json"), self.path / PARTIAL_FILE]:
            leftover.unlink(missing_ok=True)
        return description

    def _begin(self, tokenizer_folder: Path) -> None:
        if (self.path / STORE_FILE).exists():
            raise UserError(f"{self.path}: a finished feature store is there: choose another output or remove it")
        partial = self.path / PARTIAL_FILE
        if partial.is_file():
            if read_json_object(partial, f"remove {self.path}") != _partial(self._key, self._further):
                raise UserError(
                    f"{self.path}: an unfinished store of other inputs or settings is there: "
                    "choose another output or remove it"
                )
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"{self.path}: not empty and not a feature store: choose another output")
        self.path.mkdir(parents=True, exist_ok=True)
        for names in ("shard-*", STORE_FILE, PARTIAL_FILE):
            remove_leftovers(self.path, names)
        write_json(partial, _partial(self._key, self._further))
        (self.path / TOKENIZER_FOLDER).mkdir(exist_ok=True)
        for file in sorted(tokenizer_folder.iterdir()):
            if file.is_file():
                shutil.copyfile(file, self.path / TOKENIZER_FOLDER / file.name)

    def _journal(self, index: int) -> Path:
        return self.path / f"shard-{index:05d}.json"

    def _problem(self, content: ShardContent) -> str | None:
        """Return the first fault of a sample or item; None if there is none."""
        if unknown := content.further.keys() - self._further.keys():
            return f'items of "{min(unknown)}", which is no modality of the store'
        items: dict[str, Sequence[_Item]] = {"text": content.texts, "image": content.images, "audio": content.audios}
        items |= {name: content.further.get(name, []) for name in self._further}
        user_of: dict[tuple[str, int], str] = {}  # (modality, row) -> the first sample with it
        for sample in content.samples:
            if not sample.id:
                return "a sample has an empty id"
            if len(sample.rows) != len(items):
                return f'sample "{sample.id}" has {len(sample.rows)} rows for {len(items)} modalities'
            if max(sample.rows) < 0:
                return f'sample "{sample.id}" has no modality at all'
            for (modality, of_kind), row in zip(items.items(), sample.rows, strict=True):
                if not MISSING <= row < len(of_kind):
                    return f'sample "{sample.id}": no {modality} row {row}'
                user_of.setdefault((modality, row), sample.id)
        if len({sample.id for sample in content.samples}) < len(content.samples):
            return "samples have the same id"
        for modality, of_kind in items.items():
            for row, item in enumerate(of_kind):
                if (problem := self._item_problem(modality, item)) is not None:
                    user = user_of.get((modality, row))
                    return f"{modality} row {row}: {problem}" if user is None else f'sample "{user}": {modality}: {problem}'
        return None

    def _item_problem(self, modality: str, item: _Item) -> str | None:
        dims = self._dims
        if modality in self._further:
            return further_problem(item, self._further[modality])
        assert not isinstance(item, dict), "only further modalities have columns"
        if isinstance(item, TextItem):
            return text_problem(item.tokens, dims.vocab_size)
        if not isinstance(item, ImageItem):
            return audio_problem(item, dims.audio_feature_dim)
        problem = image_problem(item, dims.image_feature_dim, dims.image_num_classes)
        if problem is None and item.codes is not None:
            problem = codes_problem(item.codes, dims.num_codes)
        if problem is None and item.pixels is not None:
            problem = pixels_problem(item.pixels)
        return problem

    def _arrays(self, content: ShardContent) -> dict[str, np.ndarray]:
        dims, samples, images = self._dims, content.samples, content.images
        ids, id_offsets = join_strings([sample.id for sample in samples])
        utf8, utf8_offsets = join_strings([text.string for text in content.texts])
        labels, label_offsets = join_items(
            [np.array([self._label_codes[label] for label in sample.labels], "int32") for sample in samples], (0,)
        )
        tokens, text_offsets = join_items([text.tokens for text in content.texts], (0,))
        features, image_offsets = join_items([image.features for image in images], (0, dims.image_feature_dim))
        frames, audio_offsets = join_items(content.audios, (0, dims.audio_feature_dim))
        arrays = {
            "samples/rows": np.array([sample.rows for sample in samples]).reshape(-1, len(self.modalities)),
            "samples/id": ids,
            "samples/id_offsets": id_offsets,
            "samples/group": np.array([group_code(sample.group) for sample in samples], "int64"),
            "samples/split": np.array([self._split_codes[sample.split] for sample in samples], "uint8"),
            "samples/labels": labels,
            "samples/label_offsets": label_offsets,
            "text/tokens": tokens,
            "text/offsets": text_offsets,
            "text/utf8": utf8,
            "text/utf8_offsets": utf8_offsets,
            "image/offsets": image_offsets,
            "image/features": features,
            "image/boxes": join_items([image.boxes for image in images], (0, BOX_SIZE))[0],
            "image/labels": join_items([image.labels for image in images], (0,))[0],
            "image/scores": join_items([image.scores for image in images], (0,))[0],
            "audio/offsets": audio_offsets,
            "audio/features": frames,
        }
        pixels = [image.pixels for image in images if image.pixels is not None]
        if images and len(pixels) == len(images):
            arrays["image/pixels"] = np.stack(pixels).reshape(-1, *PIXELS_SHAPE)
        codes = [image.codes for image in images if image.codes is not None]
        if images and len(codes) == len(images):
            arrays["image/codes"] = np.stack(codes).reshape(-1, CODES_PER_IMAGE)
        for name, modality in self._further.items():
            arrays |= join_columns(name, modality, content.further.get(name, []))
        datasets = datasets_of(self._further)
        return {name: array.astype(datasets[name], copy=False) for name, array in arrays.items()}


def _read_journal(journal: Path) -> dict[str, Any]:
    """Read the journal of a shard. Raise UserError if it is damaged or names a file elsewhere."""
    remedy = "remove it: the shard is made again"
    fields = read_json_object(journal, remedy)
    expected = {"shard", "split_counts", "has_pixels", "has_codes", "sums", "notes"}
    shard = fields.get("shard")
    if fields.keys() != expected or not isinstance(shard, dict) or not is_plain_name(shard.get("file")):
        raise UserError(f"{journal}: damaged: {remedy}")
    return fields


def restore_journals(path: Path, description: StoreDescription, notes: dict[int, dict[str, Any]]) -> None:
    """Write the journals of these shards of a finished store again.

    Without its `store.json` the store is then unfinished.
    """
    for index, own in notes.items():
        shard = description.shards[index]
        file = ShardFile(path / shard.file)
        arrays = {name: np.asarray(file.array(name)[:]) for name in summed_datasets(description.further)}
        arrays |= {name: np.empty(0) for name in OPTIONAL_DATASETS if name in file.names()}
        journal = _journal_of(shard, arrays, description.split_names, own, TRAIN_SPLIT, description.further)
        write_json(path / f"{Path(shard.file).stem}.json", journal)
    write_json(path / PARTIAL_FILE, _partial(description.preparation_key, description.further))


def _partial(key: str, further: Mapping[str, FurtherModality]) -> dict[str, Any]:
    """Return the content of `partial.json`, which identifies the store that the shards and journals belong to."""
    described = [[name, modality.model_dump(mode="json")] for name, modality in further.items()]
    return {"key": key, **({"further": described} if described else {})}


def _journal_of(
    shard: ShardDescription,
    arrays: dict[str, np.ndarray],
    split_names: list[str],
    notes: dict[str, Any],
    train_split: str,
    further: Iterable[str],
) -> dict[str, Any]:
    train = split_names.index(train_split) if train_split in split_names else None
    return {
        "shard": shard.model_dump(),
        "split_counts": np.bincount(arrays["samples/split"], minlength=len(split_names)).tolist(),
        "has_pixels": "image/pixels" in arrays,
        "has_codes": "image/codes" in arrays,
        "sums": train_sums(arrays, train, further),
        "notes": notes,
    }
