"""Stores of given captions, written by the real writer with a WordPiece tokenizer of their words."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opt_ds.store import FeatureStore
from opt_ds.store.schema import MISSING, Dims
from opt_ds.store.synthetic import _random_boxes
from opt_ds.store.tokenizer import SPECIAL_TOKENS, build_wordpiece, checked_tokenizer, save_wordpiece
from opt_ds.store.writer import ImageItem, SampleItem, ShardContent, StoreWriter, TextItem


def captioned_store(
    path: Path, texts: Sequence[str], pieces: Sequence[str], groups: Sequence[int] | None = None, num_valid: int = 0
) -> FeatureStore:
    """Write a store of one image per caption; samples of one group share an image. The last `num_valid` are of "valid".

    `pieces` are the WordPieces of the vocabulary.
    """
    rng, groups = np.random.default_rng(0), list(range(len(texts))) if groups is None else list(groups)
    tokenizer = build_wordpiece([*SPECIAL_TOKENS.values(), *pieces])
    dims = Dims(image_feature_dim=8, image_num_classes=7, audio_feature_dim=6, audio_frame_rate_hz=100.0,
                vocab_size=tokenizer.get_vocab_size(), num_codes=16)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        save_wordpiece(tokenizer, Path(folder))
        writer = StoreWriter(
            path, dims=dims, split_names=["train", "valid"], splits_source="manifest",
            extractors={name: {"name": "random"} for name in ("text", "image", "audio")}, tokenizer_folder=Path(folder),
            label_names=[], info={"created_by": "tests"}, key="captions", compression=None,
        )  # fmt: skip
    content = ShardContent()
    image_of: dict[int, int] = {}
    for number, (text, group) in enumerate(zip(texts, groups, strict=True)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert SPECIAL_TOKENS["unk_token"] not in tokenizer.encode(text, add_special_tokens=False).tokens, text
        content.texts.append(TextItem(np.array(ids, dtype=np.int64), text))
        if group not in image_of:
            image_of[group] = len(content.images)
            features = rng.standard_normal((2, 8)).astype("float16")
            labels, scores, codes = np.zeros(2, np.int64), np.ones(2), np.zeros(64, np.int64)
            content.images.append(ImageItem(features, _random_boxes(rng, 2), labels, scores, None, codes))
        split = "valid" if number >= len(texts) - num_valid else "train"
        rows = (number, image_of[group], MISSING)
        content.samples.append(SampleItem(f"sample{number}", rows, f"group{group}", split, []))
    writer.write_shard(0, content)
    writer.finish(1)
    return FeatureStore(path)


def words_of(store: FeatureStore, ids: np.ndarray) -> str:
    """The text of WordPiece ids."""
    return checked_tokenizer(store.tokenizer_folder).decode(ids.tolist())
