"""Stores of random numbers, written by the real writer, for tests and benchmarks."""

import tempfile
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from opt_ds.store.schema import BOX_SIZE, CODES_PER_IMAGE, MISSING, PIXELS_SHAPE, Dims, StoreDescription
from opt_ds.store.tokenizer import SPECIAL_TOKENS, build_wordpiece, save_wordpiece
from opt_ds.store.writer import ImageItem, SampleItem, ShardContent, StoreWriter, TextItem

_Item = TypeVar("_Item")


def write_synthetic_store(
    path: str | Path,
    num_samples: int,
    *,
    seed: int = 0,
    text_len: tuple[int, int] = (3, 12),
    regions: tuple[int, int] = (4, 16),
    frames: tuple[int, int] = (16, 80),
    image_feature_dim: int = 32,
    audio_feature_dim: int = 20,
    image_num_classes: int = 50,
    vocab_size: int = 200,
    num_codes_vocab: int | None = 64,
    missing: float = 0.0,
    splits: dict[str, float] | None = None,
    pixels: bool = True,
    samples_per_shard: int = 1024,
    samples_per_group: int = 1,
    compression: Literal["gzip"] | None = None,
) -> StoreDescription:
    """Write a store of random samples. Equal arguments produce equal bytes.

    Features are standard normal. Codes, tokens (never special ones) and labels are uniform.

    Args:
        path: The new store's folder.
        num_samples: Number of samples.
        seed: Seed of all random numbers.
        text_len: Smallest and largest number of tokens per text, inclusive.
        regions: Smallest and largest number of regions per image, inclusive.
        frames: Smallest and largest number of frames per audio row, inclusive.
        image_feature_dim: Size of an image feature.
        audio_feature_dim: Size of an audio frame.
        image_num_classes: Number of region classes. 0: none.
        vocab_size: Number of tokens, including the special ones.
        num_codes_vocab: Size of the codebook; None for a store without codes.
        missing: Probability that a sample lacks a modality. At least one is kept.
        splits: Fraction of each split. Default: 0.8 train, 0.2 valid.
        pixels: Store 64 x 64 pixels.
        samples_per_shard: Samples per shard file.
        samples_per_group: Samples per group.
        compression: Compression of the shards.
    """
    splits = splits or {"train": 0.8, "valid": 0.2}
    rng = np.random.default_rng(seed)
    words = [f"w{index}" for index in range(vocab_size - len(SPECIAL_TOKENS))]
    split_of = _assign_splits(num_samples, splits)
    dims = Dims(
        image_feature_dim=image_feature_dim,
        image_num_classes=image_num_classes,
        audio_feature_dim=audio_feature_dim,
        audio_frame_rate_hz=100.0,
        vocab_size=vocab_size,
        num_codes=num_codes_vocab,
    )

    def text() -> TextItem:
        tokens = rng.integers(len(SPECIAL_TOKENS), vocab_size, rng.integers(text_len[0], text_len[1] + 1))
        return TextItem(tokens, " ".join(words[token - len(SPECIAL_TOKENS)] for token in tokens))

    def image() -> ImageItem:
        count = int(rng.integers(regions[0], regions[1] + 1))
        return ImageItem(
            features=rng.standard_normal((count, image_feature_dim), "float32").astype("float16"),
            boxes=_random_boxes(rng, count),
            labels=rng.integers(0, max(image_num_classes, 1), count),
            scores=rng.random(count),
            pixels=rng.integers(0, 256, PIXELS_SHAPE, "uint8") if pixels else None,
            codes=rng.integers(0, num_codes_vocab, CODES_PER_IMAGE) if num_codes_vocab else None,
        )

    def audio() -> np.ndarray:
        count = int(rng.integers(frames[0], frames[1] + 1))
        return rng.standard_normal((count, audio_feature_dim), "float32").astype("float16")

    with tempfile.TemporaryDirectory() as folder:
        save_wordpiece(build_wordpiece([*SPECIAL_TOKENS.values(), *words]), Path(folder))
        writer = StoreWriter(
            Path(path),
            dims=dims,
            split_names=list(splits),
            splits_source="manifest",
            extractors={name: {"name": "random", "seed": seed} for name in ("text", "image", "audio")},
            tokenizer_folder=Path(folder),
            label_names=[f"label{index}" for index in range(5)],
            info={"created_by": "write_synthetic_store"},
            key=f"synthetic {seed}",
            compression=compression,
        )
    num_shards = -(-num_samples // samples_per_shard)
    for shard in range(num_shards):
        content = ShardContent()
        for index in range(shard * samples_per_shard, min(num_samples, (shard + 1) * samples_per_shard)):
            kept = rng.random(3) >= missing
            kept[rng.integers(3)] |= not kept.any()
            rows = (
                _add(content.texts, text()) if kept[0] else MISSING,
                _add(content.images, image()) if kept[1] else MISSING,
                _add(content.audios, audio()) if kept[2] else MISSING,
            )
            labels = [f"label{index % 5}"]
            group = f"group{index // samples_per_group}"
            content.samples.append(SampleItem(f"sample{index}", rows, group, split_of[index], labels))
        writer.write_shard(shard, content)
    return writer.finish(num_shards)


def _add(items: list[_Item], item: _Item) -> int:
    """Append the item and return its row."""
    items.append(item)
    return len(items) - 1


def _assign_splits(num_samples: int, splits: dict[str, float]) -> list[str]:
    """Return the split of each sample. Splits are contiguous, and each gets its fraction to within one sample."""
    bounds = np.rint(np.cumsum(list(splits.values())) / sum(splits.values()) * num_samples).astype(int)
    return [list(splits)[int(np.searchsorted(bounds, index, side="right"))] for index in range(num_samples)]


def _random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corners = np.sort(rng.random((count, 2, 2), "float32"), axis=1)  # [:, 0] is the upper left corner
    sizes = corners[:, 1] - corners[:, 0]
    boxes = np.concatenate([corners.reshape(count, 4), sizes, sizes.prod(1, keepdims=True)], axis=1)
    assert boxes.shape == (count, BOX_SIZE)
    return boxes
