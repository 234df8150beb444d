"""A small store of fixed input, without random numbers and without a tokenizer library whose files change with its version."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.store.files import file_sha256
from opt_ds.store.schema import Dims
from opt_ds.store.writer import ImageItem, SampleItem, ShardContent, StoreWriter, TextItem

DIMS = Dims(
    image_feature_dim=4, image_num_classes=5, audio_feature_dim=3, audio_frame_rate_hz=50.0, vocab_size=9, num_codes=16
)
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"))},
    },
}  # fmt: skip
#: Rows of the samples of three shards: all kinds of subsets, shared rows, a shard without images and an empty one.
ROWS = [[(0, 0, 0), (1, -1, 0), (-1, 1, 1), (2, 2, -1)], [(0, -1, -1), (-1, -1, 0)], []]


def text(seed: int) -> TextItem:
    tokens = 5 + np.arange(seed % 3 + 1) * (seed + 1) % 4
    return TextItem(tokens, f"é{seed} " + "abcd"[seed % 4])


def image(seed: int) -> ImageItem:
    count = seed % 3 + 1
    corners = np.array([[0.125 * (seed % 4), 0.25, 0.75, 0.5 + 0.0625 * row] for row in range(count)], "float32")
    sizes = corners[:, 2:] - corners[:, :2]
    return ImageItem(
        features=(np.arange(count * 4).reshape(count, 4) * 7 % 11 - 5 + seed) / 8,
        boxes=np.concatenate([corners, sizes, sizes.prod(1, keepdims=True)], axis=1),
        labels=(np.arange(count) + seed) % 5,
        scores=(np.arange(count) + 1) / 4,
        pixels=(np.arange(3 * 64 * 64).reshape(3, 64, 64) * (seed + 1) % 251).astype("uint8"),
        codes=np.arange(64) * (seed + 3) % 16,
    )


def audio(seed: int) -> np.ndarray:
    count = seed % 4 + 1
    return (np.arange(count * 3).reshape(count, 3) * 5 % 13 - 6 - seed) / 16


def new_writer(path: Path, **changes: Any) -> StoreWriter:
    tokenizer = path.with_name("tokenizer")
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    extractors = {name: {"name": "fixed", "version": "1"} for name in ("text", "image", "audio", "codes")}
    options: dict[str, Any] = {
        "dims": DIMS, "split_names": ["train", "valid"], "splits_source": "manifest", "extractors": extractors,
        "tokenizer_folder": tokenizer, "label_names": ["x", "ý"], "info": {"made": "here"}, "key": "key",
    }  # fmt: skip
    return StoreWriter(path, **{**options, **changes})


def contents(
    rows: Sequence[Sequence[tuple[int, ...]]] = ROWS,
    further: dict[str, Callable[[int], dict[str, np.ndarray]]] | None = None,
) -> list[ShardContent]:
    """The content of each shard; row r of a modality is made from the number r. `further`: what makes its rows, by modality."""
    further = further or {}
    numbers = iter(range(100))
    shards = []
    for shard in rows:
        samples = [
            SampleItem(f"sämple{n}", each, f"group{n // 2}", "valid" if n % 4 == 3 else "train", ["ý", "x"][: n % 3])
            for each, n in zip(shard, numbers, strict=False)
        ]
        counts = np.array(shard, int).reshape(-1, 3 + len(further)).max(0, initial=-1) + 1
        makers = (text, image, audio, *further.values())
        kinds: list[list[Any]] = [[make(row) for row in range(count)] for make, count in zip(makers, counts, strict=True)]
        shards.append(ShardContent(samples, *kinds[:3], further=dict(zip(further, kinds[3:], strict=True))))
    return shards


def write(writer: StoreWriter, contents: Sequence[ShardContent]) -> None:
    """Write all shards, and leave the store unfinished."""
    for index, content in enumerate(contents):
        writer.write_shard(index, content, notes={"shard": index})


def hashes(path: Path) -> dict[str, str]:
    """The SHA-256 of each file by its name; the record of a verification is not part of a store."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "verified.json"]
    return {str(file.relative_to(path)): file_sha256(file) for file in files}
