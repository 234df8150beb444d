"""The writer refuses exactly the items that `inspect` refuses in a finished store."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opt_ds.errors import UserError
from opt_ds.store.checks import audio_problem, codes_problem, image_problem, text_problem
from opt_ds.store.inspect import inspect_store
from opt_ds.store.schema import Dims
from opt_ds.store.tokenizer import SPECIAL_TOKENS, build_wordpiece, save_wordpiece
from opt_ds.store.writer import ImageItem, SampleItem, ShardContent, StoreWriter, TextItem

DIMS = Dims(
    image_feature_dim=4, image_num_classes=5, audio_feature_dim=3, audio_frame_rate_hz=100.0, vocab_size=8, num_codes=6
)
_CORNERS = np.array([[0.0, 0.1, 0.5, 0.6], [0.2, 0.2, 1.0, 0.9]], "float32")


def image() -> ImageItem:
    sizes = _CORNERS[:, 2:] - _CORNERS[:, :2]
    boxes = np.concatenate([_CORNERS, sizes, sizes.prod(1, keepdims=True)], 1)
    features = np.arange(8, dtype="float16").reshape(2, 4)
    codes, pixels = np.arange(64, dtype="uint16") % 6, np.zeros((3, 64, 64), "uint8")
    return ImageItem(features, boxes, np.array([0, 4], "int16"), np.array([1, 0], "float16"), pixels, codes)


def new_writer(path: Path, labels: Sequence[str] = ()) -> StoreWriter:
    tokenizer = path.with_name("tokenizer")
    save_wordpiece(build_wordpiece([*SPECIAL_TOKENS.values(), "a", "b", "c"]), tokenizer)
    extractors = {name: {"name": "none"} for name in ("text", "image", "audio")}
    extractors["codes"] = {"name": "dvae"}
    return StoreWriter(
        path, dims=DIMS, split_names=["valid"], splits_source="manifest", extractors=extractors, tokenizer_folder=tokenizer,
        label_names=labels,
    )  # fmt: skip


def content_of(seed: int, item: ImageItem, tokens: np.ndarray, frames: np.ndarray) -> ShardContent:
    samples = [SampleItem(f"good{seed}", (0, 0, 0), "g", "valid"), SampleItem(f"odd{seed}", (1, 1, 1), "h", "valid")]
    texts = [TextItem(np.array([5, 6]), "a b"), TextItem(tokens, "?")]
    return ShardContent(samples, texts, [image(), item], [np.ones((2, 3), "float16"), frames])


def spoiled(array: np.ndarray, value: float, place: int) -> np.ndarray:
    array = array.copy()
    array.reshape(-1)[place % array.size] = value
    return array


def corruptions(seed: int) -> tuple[ImageItem, np.ndarray, np.ndarray]:
    """An item of each kind of which one value may be wrong, in the dtypes of a store."""
    random = np.random.default_rng(seed)
    item, tokens, frames = image(), np.array([5, 7, 1], "int32"), np.ones((4, 3), "float16")
    place = int(random.integers(1000))
    floats = [0.25, 1.0, 1.0005, 1.01, -0.0005, -0.2, 640.0, np.nan, np.inf, 65504.0]
    whole = [0, 1, 4, 5, 6, 7, 8, -1, 300]
    field = random.choice(["features", "boxes", "labels", "scores", "codes", "tokens", "frames", "empty"])
    if field == "tokens":
        tokens = spoiled(tokens, random.choice(whole), place)
    elif field == "frames":
        frames = spoiled(frames, random.choice(floats), place)
    elif field == "empty":
        kind = random.integers(3)
        tokens, frames = (tokens[:0] if kind == 0 else tokens), (frames[:0] if kind == 1 else frames)
        cut = {name: getattr(item, name)[:0] for name in ("features", "boxes", "labels", "scores")}
        item = replace(item, **cut) if kind == 2 else item
    else:
        values = whole if field == "labels" else [value for value in whole if value >= 0] if field == "codes" else floats
        item = replace(item, **{field: spoiled(getattr(item, field), random.choice(values), place)})
    return item, tokens, frames


def test_the_writer_refuses_what_inspect_refuses_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [content_of(seed, *corruptions(seed)) for seed in range(50)]
    writer, refused = new_writer(tmp_path / "checked"), set()
    for seed, content in enumerate(contents):
        try:
            writer.write_shard(seed, content)
        except UserError as error:
            assert f'sample "odd{seed}": ' in str(error), "the sample is named, not its neighbour"
            refused.add(f"shard-{seed:05d}.h5")
    monkeypatch.setattr(StoreWriter, "_problem", lambda self, content: None)
    unchecked = new_writer(tmp_path / "unchecked")
    for seed, content in enumerate(contents):
        unchecked.write_shard(seed, content)
    unchecked.finish(len(contents))
    failures = [line for line in inspect_store(tmp_path / "unchecked").failures if line.startswith("shard-")]
    assert {line.partition(":")[0] for line in failures} == refused, failures
    assert 10 < len(refused) < 45


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"features": np.full((2, 4), 1e5, "float32")}, "features: 100000 is beyond float16, whose largest value is 65504"),
        ({"features": np.full((2, 4), -1e5)}, "features: 100000 is beyond float16"),
        ({"features": np.full((2, 4), "1")}, "features of dtype <U1, not numbers"),
        ({"features": np.ones((2, 4), "complex64")}, "features of dtype complex64, not numbers"),
        ({"features": np.ones((2, 5), "float16")}, r"features of shape \[2, 5\], not \[N, 4\]"),
        ({"labels": np.array([0.0, 1.0])}, "labels of dtype float64, not integers"),
        ({"labels": np.array([0, 2**16])}, "labels: value 65536 in row 1 is outside 0..4"),
        ({"scores": np.array([0.5, 1.2])}, "scores: value 1.2 in row 1 is outside 0..1"),
        ({"boxes": np.tile(np.array([0.5, 0, 0.2, 1, -0.3, 1, -0.3], "float32"), (2, 1))}, "boxes: value -0.3"),
    ],
)
def test_values_are_judged_before_they_are_cast(changes: dict[str, np.ndarray], reason: str) -> None:
    found = image_problem(replace(image(), **changes), 4, 5)
    assert found is not None and re.search(reason, found), found
    assert image_problem(image(), 4, 5) is None


def test_other_items_are_judged_too() -> None:
    assert text_problem(np.array([], "int32"), 8) == "tokens are empty"
    assert text_problem(np.array([8]), 8) == "tokens: value 8 in row 0 is outside 0..7"
    assert codes_problem(np.full(64, 70_000), 6) == "codes: value 70000 in row 0 is outside 0..5"
    assert codes_problem(np.zeros(63, "uint16"), 6) == "codes of shape [63], not [64]"
    assert audio_problem(np.zeros((0, 3), "float16"), 3) == "features are empty"
    assert audio_problem(np.full((1, 3), 7e4, "float32"), 3) == "features: 70000 is beyond float16, whose largest value is 65504"


def test_labels_that_no_int16_holds_are_refused() -> None:
    item = replace(image(), labels=np.array([0, 40_000]))
    assert image_problem(item, 4, 50_000) == "labels: values do not fit int16"
