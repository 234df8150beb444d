"""Stores of scenes for tests: real captions, negatives and, if drawn, images; random features unless they are given."""

import re
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.scenes.captions import different_captions
from opt_ds.scenes.checker import for_checking
from opt_ds.scenes.drawing import draw
from opt_ds.scenes.negatives import hard_negatives
from opt_ds.scenes.random_choices import Choices
from opt_ds.scenes.records import SceneRecord
from opt_ds.scenes.sampling import COMPOSITION, TRAIN, scenes, split_of
from opt_ds.store import FeatureStore
from opt_ds.store.schema import CODES_PER_IMAGE, Dims
from opt_ds.store.tokenizer import SPECIAL_TOKENS, build_wordpiece, save_wordpiece
from opt_ds.store.writer import ImageItem, SampleItem, ShardContent, StoreWriter, TextItem
from tests.tiny import make_config, make_model

SAMPLES = {TRAIN: 40, COMPOSITION: 24}
CODEBOOK, REGIONS, FRAMES = 16, 2, 4
WHOLE_IMAGE = np.array([0, 0, 1, 1, 1, 1, 1], "float32")  # the box: corners, width, height, area
_PIECE = re.compile(r"\w+|[^\w\s]")


def make_records(samples: Mapping[str, int] = SAMPLES) -> list[SceneRecord]:
    """The first scenes of some splits, with four captions and the negatives of the first one."""
    found: dict[str, list[SceneRecord]] = {split: [] for split in samples}
    for number, scene in enumerate(islice(scenes(1), 600)):
        own = found.get(split_of(number))
        if own is None or len(own) == samples[split_of(number)]:
            continue
        captions = different_captions(scene.graph, Choices("captions", number), 4)
        negatives = hard_negatives(scene.graph, *captions[0][1:], Choices("negatives", number))
        own.append(
            SceneRecord(
                f"{number:012d}", split_of(number), scene, (), tuple(text for text, _, _ in captions),
                {kind: text for kind, (_, text) in negatives.items()},
            )
        )  # fmt: skip
    return [record for records in found.values() for record in records]


def write_store(
    path: Path,
    records: list[SceneRecord],
    *,
    drawn: bool = True,
    coded: bool = True,
    region: Callable[[SceneRecord], np.ndarray] | None = None,
    width: int = 8,
) -> None:
    """Write a store of the records.

    `drawn`: with pixels. `coded`: with random codes. `region`: returns the feature [width] of all regions of an image; None:
    random ones.
    """
    texts = [text for record in records for text in (*record.captions, *record.negatives.values())]
    vocabulary = [*SPECIAL_TOKENS.values(), *sorted({word for text in texts for word in _PIECE.findall(text.lower())})]
    number_of = {word: number for number, word in enumerate(vocabulary)}
    save_wordpiece(build_wordpiece(vocabulary), path.with_name("tokenizer"))
    random = np.random.default_rng(0)
    writer = StoreWriter(
        path,
        dims=Dims(
            image_feature_dim=width, image_num_classes=7, audio_feature_dim=6, audio_frame_rate_hz=100.0,
            vocab_size=len(vocabulary), num_codes=CODEBOOK if coded else None,
        ),
        split_names=sorted({record.split for record in records}, reverse=True), splits_source="manifest",
        tokenizer_folder=path.with_name("tokenizer"),
        extractors={name: {"name": "random"} for name in ("text", "image", "audio")},
    )  # fmt: skip
    content = ShardContent()
    for row, record in enumerate(records):
        caption = record.captions[0]
        tokens = np.array([number_of[word] for word in _PIECE.findall(caption.lower())])
        content.texts.append(TextItem(tokens, caption))
        seen = random.standard_normal((REGIONS, width)) if region is None else np.tile(region(record), (REGIONS, 1))
        pixels = for_checking(draw(record.scene)).transpose(2, 0, 1) if drawn else None
        codes = random.integers(0, CODEBOOK, CODES_PER_IMAGE) if coded else None
        content.images.append(
            ImageItem(
                seen.astype("float16"), np.tile(WHOLE_IMAGE, (REGIONS, 1)), np.zeros(REGIONS, np.int64),
                np.ones(REGIONS), pixels, codes,
            )
        )  # fmt: skip
        content.audios.append(random.standard_normal((FRAMES, 6)).astype("float16"))
        content.samples.append(SampleItem(record.id, (row, row, row), record.id, record.split, []))
    writer.write_shard(0, content)
    writer.finish(1)


def open_model(store: FeatureStore, **tasks: Any) -> Evaluator:
    """Return a random model of a few thousand weights that reads the store's captions as they are."""
    torch.set_num_threads(1)
    dims = store.description.dims
    sizes = {"num_image_codes": CODES_PER_IMAGE, "vocab_size": dims.vocab_size, "max_text_tokens": 40,
             "image_feature_dim": dims.image_feature_dim}  # fmt: skip
    config = make_config(data={"stores": [str(store.path)]}, model=sizes, tasks=tasks)
    return Evaluator(make_model(config), config, store)
