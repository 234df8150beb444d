"""The bytes of stores of text, image and audio are fixed: the files of a small store of fixed input, by their SHA-256.

A change of these bytes changes fingerprints, so models would no longer recognise the stores they were trained on. The
hashes are of the files that opt_ds wrote before stores could have further modalities.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from opt_ds.store import inspect_store, set_codes
from opt_ds.store.files import file_sha256
from opt_ds.store.schema import Dims
from opt_ds.store.split import split_by_list
from opt_ds.store.writer import ImageItem, SampleItem, ShardContent, StoreWriter, TextItem

DIMS = Dims(
    image_feature_dim=4, image_num_classes=5, audio_feature_dim=3, audio_frame_rate_hz=50.0, vocab_size=9, num_codes=16
)
# A tokenizer written here: the library's own files may change with its version.
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"))},
    },
}  # fmt: skip
UNFINISHED = {
    "partial.json": "a09d1a74a960067437d5027fa68d7d4da4c3b4d6e71bb7c74be141518c92d6eb",
    "shard-00000.h5": "cfef4016c183741271c0c34e5122768b5aaca8df98ce1d23e31487ebb24f0cb3",
    "shard-00000.json": "77e1b1d51c1030d919132d0bb382d06398855b4e9e2f6293f15b924c175d3251",
    "shard-00001.h5": "76c27c07183826c986203cb787665b549a1543e08bb1ddc4d950a6962a0148f1",
    "shard-00001.json": "57728e91929aa1eb5b668735c6cb7c68d0a1b9ed4f12e9541f75534de2bdbcd1",
    "shard-00002.h5": "0ff91ded40ae23570e71d590b9c94faff74ee550a3f56465c5a1ac2e26d5950a",
    "shard-00002.json": "1ca104324afa33a8e984d3fcc94e57cb8bd88f159a69fb633636b18b25bb3ac7",
    "tokenizer/tokenizer.json": "4e5557f8a6a9a28c26a57daceab3362040e1a3de437e432e445b3583cf1262f4",
}
FINISHED = {
    "index.h5": "b3eb9111a908ad05e11d262084f7977f8c2d3d6cdbea98120e0c4307cc645dee",
    "shard-00000.h5": "cfef4016c183741271c0c34e5122768b5aaca8df98ce1d23e31487ebb24f0cb3",
    "shard-00001.h5": "76c27c07183826c986203cb787665b549a1543e08bb1ddc4d950a6962a0148f1",
    "shard-00002.h5": "0ff91ded40ae23570e71d590b9c94faff74ee550a3f56465c5a1ac2e26d5950a",
    "store.json": "69ccf06dddec6d9a55bd6e2d96a17156ca62ee4a47e9124db717afd183dae7f1",
    "tokenizer/tokenizer.json": "4e5557f8a6a9a28c26a57daceab3362040e1a3de437e432e445b3583cf1262f4",
}
CHANGED = {
    "index.h5": "974a27478474e68524d1d8272b3df7d335d3739ae396ae4b1cf2cb6f32110546",
    "shard-00000-r2.h5": "702e60d8cd734aa2c7b3a44cb296a7cc0d908651dbda27176a8a56b45ac0f11a",
    "shard-00001-r2.h5": "eb8e6a5ddc507ba5fc6ab499f4b9bd6dec8a0dfa2a1a6f905182488151e1a4a6",
    "shard-00002-r2.h5": "e26f32344b6d35c93125ce78997d8ba67b522ec5d4c5b996e32976bd1a9198a6",
    "store.json": "f2964958d0736b91bc23cf08f509896219652c57defc52f352029060399a0756",
    "tokenizer/tokenizer.json": "4e5557f8a6a9a28c26a57daceab3362040e1a3de437e432e445b3583cf1262f4",
}


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


def new_writer(path: Path, tokenizer: Path, **changes: object) -> StoreWriter:
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    extractors = {name: {"name": "fixed", "version": "1"} for name in ("text", "image", "audio", "codes")}
    options = {
        "dims": DIMS, "split_names": ["train", "valid"], "splits_source": "manifest", "extractors": extractors,
        "tokenizer_folder": tokenizer, "label_names": ["x", "ý"], "info": {"made": "here"}, "key": "key",
    }  # fmt: skip
    return StoreWriter(path, **{**options, **changes})  # type: ignore[arg-type]


def contents() -> list[ShardContent]:
    """Three shards: samples of all subsets of modalities, one shared row, a shard without images and an empty one."""
    rows = [[(0, 0, 0), (1, -1, 0), (-1, 1, 1), (2, 2, -1)], [(0, -1, -1), (-1, -1, 0)], []]
    numbers = iter(range(100))
    shards = []
    for shard in rows:
        samples = [
            SampleItem(f"sämple{n}", each, f"group{n // 2}", "valid" if n % 4 == 3 else "train", ["ý", "x"][: n % 3])
            for each, n in zip(shard, numbers, strict=False)
        ]
        counts = np.array(shard, int).reshape(-1, 3).max(0, initial=-1) + 1
        kinds = [[make(seed) for seed in range(count)] for make, count in zip((text, image, audio), counts, strict=True)]
        shards.append(ShardContent(samples, *kinds))  # type: ignore[arg-type]
    return shards


def hashes(path: Path) -> dict[str, str]:
    """The SHA-256 of each file by its name; the record of a verification is not part of a store."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "verified.json"]
    return {str(file.relative_to(path)): file_sha256(file) for file in files}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    writer = new_writer(tmp_path / "s", tmp_path / "tokenizer")
    for index, content in enumerate(contents()):
        writer.write_shard(index, content, notes={"shard": index})
    assert hashes(tmp_path / "s") == UNFINISHED
    writer.finish(3)
    return tmp_path / "s"


def test_a_store_of_the_three_modalities_keeps_its_bytes(store: Path, tmp_path: Path) -> None:
    assert hashes(store) == FINISHED
    assert inspect_store(store).failures == []
    (tmp_path / "list.csv").write_text("sämple1,valid\n", encoding="utf-8")
    split_by_list(store, tmp_path / "list.csv")
    set_codes(store, np.arange(3 * 64).reshape(3, 64) % 5, {"name": "fixed", "num_codes": 8})
    assert hashes(store) == CHANGED
