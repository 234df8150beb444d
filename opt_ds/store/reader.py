"""Read a feature store: samples by index, features by row, without copies if the shards are uncompressed.

Rows are global here: row r of a modality counts through all shards in their order. In a shard file rows are local.
"""

import bisect
import itertools
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from opt_ds.errors import UserError, did_you_mean
from opt_ds.store.files import file_sha256
from opt_ds.store.foreign import check_inside, is_inside
from opt_ds.store.index import ShardFile, StoreIndex, build_index, read_index
from opt_ds.store.records import record_folder, run_records
from opt_ds.store.schema import DVAE_FOLDER, MODALITIES, ShardDescription, StoreDescription, load_description

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_NO_ROWS = np.zeros(0, np.int32)


class Regions(NamedTuple):
    """The regions of one image.

    `features` is float16 [R, Dv], `boxes` float32 [R, 7], `labels` int16 [R], `scores` float16 [R].
    """

    features: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


class FeatureStore:
    """A feature store opened for reading.

    Opening raises UserError if the directory is no store, has another schema version, or a shard is missing or
    truncated. HDF5 files are opened on first use in each process. An instance can be pickled, and used across fork and
    spawn. Returned views are read-only and stay valid as long as they are referenced.
    """

    def __init__(self, path: str | Path, run: Path | None = None) -> None:
        """Open the store.

        `run` is the output directory of a run, which keeps the records of a read-only store (`store.records`).
        """
        self.path, self._run = Path(path), run
        self.description: StoreDescription = load_description(self.path)
        check_sizes(self.path, self.description)
        shards = self.description.shards
        self._sample_starts = _starts([shard.num_samples for shard in shards])
        self.modalities = self.description.modalities  # names, in the order of the columns of `rows`
        self._starts = {name: _starts([shard.num_rows(name) for shard in shards]) for name in self.modalities}
        # Looking these up in the dictionary would be a measurable part of reading an item.
        self._text_starts, self._image_starts, self._audio_starts = (self._starts[name] for name in MODALITIES)
        self._open: dict[int, ShardFile] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict:
        return {"path": self.path, "run": self._run}

    def __setstate__(self, state: dict) -> None:
        FeatureStore.__init__(self, state["path"], state.get("run"))

    @cached_property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @property
    def fingerprint(self) -> str:
        """Hash of the store's content."""
        return self.description.fingerprint

    @property
    def num_samples(self) -> int:
        """Number of samples N."""
        return self.description.num_samples

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the WordPiece tokenizer."""
        return self.path / self.description.tokenizer_folder

    @property
    def has_codes(self) -> bool:
        """Whether every image has image codes."""
        return self.description.has_codes

    @property
    def has_pixels(self) -> bool:
        """Whether every image has its 64 x 64 pixels."""
        return self.description.has_pixels

    @cached_property
    def index(self) -> StoreIndex:
        """The index of all samples: mapped from `index.h5`, or built from the shards if there is none."""
        index = read_index(self.path, self.description)
        if index is None and self._run is not None:
            index = read_index(run_records(self.path, self._run), self.description)
        return index or build_index(self.path, self.description)

    @property
    def records(self) -> Path | None:
        """Folder where a run keeps data derived from this store; None if the store was opened outside a run."""
        return None if self._run is None else record_folder(self.path, self._run)

    @property
    def rows(self) -> np.ndarray:
        """Global row of each sample in each of `modalities`, int64 [N, M]; -1 if it has none."""
        return self.index.rows

    @property
    def groups(self) -> np.ndarray:
        """Group code of each sample, int64 [N]. Samples of one group must not be used as negatives for each other."""
        return self.index.groups

    @property
    def split_codes(self) -> np.ndarray:
        """Split of each sample as an index into description.split_names, uint8 [N]."""
        return self.index.splits

    @property
    def text_lengths(self) -> np.ndarray:
        """Number of tokens per text row, without [CLS] and [SEP]; int32."""
        return self.index.lengths["text"]

    @property
    def region_counts(self) -> np.ndarray:
        """Number of regions per image row, int32."""
        return self.index.lengths["image"]

    @property
    def frame_counts(self) -> np.ndarray:
        """Number of stored frames per audio row, int32."""
        return self.index.lengths["audio"]

    def lengths(self, modality: str) -> np.ndarray:
        """Return the number of items of each row of a modality, int32. For text these are tokens.

        A modality that the store does not have has no rows.
        """
        return self.index.lengths.get(modality, _NO_ROWS)

    def split_samples(self, split: str) -> np.ndarray:
        """Return the sample indices of a split, ascending int64. Raise UserError if there is no such split."""
        place = self._split_place(split)
        ends = np.cumsum(self.index.subsets.sum(1))
        return self.index.by_split[ends[place] - self.index.subsets[place].sum() : ends[place]]

    def split_subsets(self, split: str) -> np.ndarray:
        """Return the number of samples of a split by modalities, int64 [2**M].

        Bit m of the index stands for column m of `rows`: 0 text, 1 image, 2 audio, then further modalities.
        """
        return self.index.subsets[self._split_place(split)]

    def all_have(self, modality: int) -> bool:
        """Return whether every sample has the modality of this column of `rows`. False if the store has no such column."""
        if modality >= len(self.modalities):
            return False
        without = np.arange(self.index.subsets.shape[1]) >> modality & 1 == 0
        return not self.index.subsets[:, without].any()

    def _split_place(self, split: str) -> int:
        names = self.description.split_names
        if split not in names:
            raise UserError(
                f'{self.path}: no split "{split}"{did_you_mean(split, names)}: it has {", ".join(names) or "none"}'
            )
        return names.index(split)

    def sample_id(self, index: int) -> str:
        """Return the id of a sample."""
        shard, local = self._locate(self._sample_starts, index)
        return shard.item("samples/id", "samples/id_offsets", local).tobytes().decode("utf-8")

    def labels(self, index: int) -> list[str]:
        """Return the labels of a sample in the manifest's order; empty if it has none."""
        shard, local = self._locate(self._sample_starts, index)
        codes = shard.item("samples/labels", "samples/label_offsets", local)
        return [self.description.label_names[code] for code in codes]

    def text(self, row: int) -> np.ndarray:
        """Return the tokens of a text row, int32 [n], without [CLS] and [SEP]."""
        shard, local = self._locate(self._text_starts, row)
        return shard.item("text/tokens", "text/offsets", local)

    def caption(self, row: int) -> str:
        """Return the original string of a text row."""
        shard, local = self._locate(self._text_starts, row)
        return shard.item("text/utf8", "text/utf8_offsets", local).tobytes().decode("utf-8")

    def regions(self, row: int) -> Regions:
        """Return the regions of an image row."""
        shard, local = self._locate(self._image_starts, row)
        kept, array = shard.bounds("image/offsets", local), shard.array
        return Regions(
            array("image/features")[kept], array("image/boxes")[kept], array("image/labels")[kept], array("image/scores")[kept]
        )

    def region_features(self, row: int) -> np.ndarray:
        """Return only the features of an image row's regions, float16 [R, Dv]."""
        shard, local = self._locate(self._image_starts, row)
        return shard.item("image/features", "image/offsets", local)

    def frames(self, row: int) -> np.ndarray:
        """Return the frames of an audio row, float16 [T, Da]."""
        shard, local = self._locate(self._audio_starts, row)
        return shard.item("audio/features", "audio/offsets", local)

    def features(self, modality: str, row: int) -> np.ndarray:
        """Return the features of a row of any modality but text, float16 [items, size]."""
        shard, local = self._locate(self._starts[modality], row)
        return shard.item(f"{modality}/features", f"{modality}/offsets", local)

    def columns(self, modality: str, row: int) -> dict[str, np.ndarray]:
        """Return the columns of a row of a further modality; see `FurtherModality` for their dtypes and shapes."""
        shard, local = self._locate(self._starts[modality], row)
        kept = shard.bounds(f"{modality}/offsets", local)
        return {name: shard.array(f"{modality}/{name}")[kept] for name in self.description.further[modality].columns}

    def codes(self, row: int) -> np.ndarray:
        """Return the codes of an image row, uint16 [64], in row-major order of the 8 x 8 grid.

        Raise UserError if there are none.
        """
        if not self.has_codes:
            raise UserError(f"{self.path}: the store has no image codes: train a dVAE with `opt-ds train-dvae`")
        shard, local = self._locate(self._image_starts, row)
        return shard.array("image/codes")[local]

    def pixels(self, row: int) -> np.ndarray:
        """Return the pixels of an image row, uint8 [3, 64, 64] RGB. Raise UserError if the store has none."""
        if not self.has_pixels:
            raise UserError(f"{self.path}: the store has no pixels (image/pixels): prepare it with --pixels")
        shard, local = self._locate(self._image_starts, row)
        return shard.array("image/pixels")[local]

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Load the store's WordPiece tokenizer."""
        from opt_ds.store.tokenizer import load_tokenizer

        return load_tokenizer(self.tokenizer_folder)

    def read_ahead(self, modality: str, row: int) -> int:
        """Ask the system to read the features of a row from disk, without waiting. Return their bytes.

        `modality` is any modality except "text", which has no features.
        """
        shard, local = self._locate(self._starts[modality], row)
        kept = shard.bounds(f"{modality}/offsets", local)
        return shard.will_need(f"{modality}/features", kept.start, kept.stop)

    def release_pages(self) -> None:
        """Release the memory of pages read so far.

        Otherwise the process appears to hold everything that it has ever read.
        """
        for file in list(self._open.values()):
            file.release_pages()

    def shard(self, index: int) -> ShardFile:
        """Return shard `index`, for code that iterates over complete shards."""
        return self._shard(index)

    def _shard(self, index: int) -> ShardFile:
        if self._process != os.getpid():  # HDF5 handles must not be used across a fork
            self._open, self._process = {}, os.getpid()
        if index not in self._open:
            file = self.path / self.description.shards[index].file
            self._open[index] = ShardFile(file, self.index.layout[index], self.description)
        else:
            self._open[index].check_size()
        return self._open[index]

    def _locate(self, starts: list[int], row: int) -> tuple[ShardFile, int]:
        if not 0 <= row < starts[-1]:
            raise IndexError(f"row {row} of {starts[-1]}")
        index = bisect.bisect_right(starts, row) - 1
        return self._shard(index), int(row) - starts[index]


def check_sizes(path: Path, description: StoreDescription) -> None:
    """Raise UserError, naming the file, if a shard is missing or its size differs from `store.json`."""
    for shard in description.shards:
        problem = size_problem(path, shard)
        if problem:
            raise UserError(f"{path / shard.file}: {problem}: prepare the store again")
    for folder in (path / description.tokenizer_folder, path / DVAE_FOLDER):
        for file in (folder, *(folder.iterdir() if folder.is_dir() else ())):
            check_inside(path, file)


def check_contents(path: Path, shard: ShardDescription) -> None:
    """Raise UserError, naming the file, if a shard differs from its checksum.

    A rewritten copy would get a valid checksum.
    """
    if file_sha256(path / shard.file) != shard.sha256:
        raise UserError(f"{path / shard.file}: checksum differs from store.json's: restore the file, or prepare the store again")


def size_problem(path: Path, shard: ShardDescription) -> str | None:
    """Return what is wrong with the presence or size of a shard file; None if nothing."""
    try:
        size = (path / shard.file).stat().st_size
    except OSError:
        return "shard is missing"
    if not is_inside(path, path / shard.file):
        return f"leads out of {path}"
    return None if size == shard.bytes else f"shard is truncated or foreign ({size} bytes, store.json says {shard.bytes})"


def _starts(lengths: list[int]) -> list[int]:
    return list(itertools.accumulate(lengths, initial=0))
