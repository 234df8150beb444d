"""The bytes of a store, as they were when extractors became units: an old, unfinished store must resume.

No weights are needed: precomputed regions, log-mel energies and a trained tokenizer. The recordings are silent, since the
last bits of a Fourier transform depend on the processor.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.store.schema import STORE_FILE

SETTINGS = PrepareSettings(images="npz", samples_per_shard=3, vocab_size=60, pool_frames=2, max_frames=40)
#: SHA-256 of every file, as the earlier code wrote it. store.json without what depends on the versions of packages.
FILES = {
    "index.h5": "624c99d2fbfabd92296cc0e583e0130cd57fdcf15f59af4584e1de8f4138ab6a",
    "report.json": "778fddb5ce75989108ce809ea6383ad3412560a1aaf5a4605dace285dfa21afc",
    "shard-00000.h5": "b2d3662e46e2b4f092b75d90eea2e204b84c827b123bb2a9e4e645cff7849d64",
    "shard-00001.h5": "c7be76c5a42574a602a7d20a278fd5018b835f2350a81c26350c558024f95700",
    "shard-00002.h5": "b41a62c4a1fd368eac965f00871f24b7e2017d8602ae6e6f05cfe13744ca52f5",
    "store.json": "95597898e838adbaf2be8978b5932129c24c44ffe54a3336cd786db0ec16bf15",
    "tokenizer/tokenizer.json": "fc3efb7957d1678cc8f9b4ed9beee1540bc2f80f592dbbd2af4332520cef2022",
    "tokenizer/tokenizer_config.json": "a818f996ef1b23b13da14920c6608a088272da1a87fb80993d53f3c6ec40aebe",
    "tokenizer/vocab.txt": "735a3ac0559686f1f6e162d629013f51522079f24aeb0e5676078bbc73c67e92",
}
#: The settings as `preparation_key` hashes them.
HASHED_SETTINGS = {
    "images": "npz", "image_backbone": "None", "image_min_side": "600", "image_max_side": "1000", "max_pixels": "100000000",
    "pixels": "True", "speech": "logmel", "speech_layer": "None", "speech_window_s": "30.0", "speech_overlap_s": "2.0",
    "trim_silence": "False", "pool_frames": "2", "max_frames": "40", "max_seconds": "3600.0", "text": None, "vocab_size": "60",
    "unicode_form": "NFC", "max_tokens": "510", "samples_per_shard": "3", "compression": "None",
}  # fmt: skip


def described_store(folder: Path) -> Path:
    """Return a manifest of seven samples: with regions, silence and texts, one of them with a file that is missing."""
    for number in range(4):
        count = 11 + number
        corners = np.tile([0.0, 0.25, 0.5, 0.75], (count, 1)).astype("float32")
        np.savez(
            folder / f"{number}.npz",
            features=(np.arange(count * 2048).reshape(count, 2048) % (97 + number)).astype("float16"),
            norm_bb=corners,
            conf=(1 - np.arange(count) / 64).astype("float32"),
            soft_labels=np.eye(count, 1601, k=number, dtype="float32"),
        )
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", np.zeros(8000 + 4000 * number, "int16"), 16000)
    lines: list[dict[str, Any]] = [
        {"id": "a", "image": "0.npz", "text": "A red thing", "audio": "0.wav", "labels": ["b", "a"]},
        {"id": "b", "image": "1.npz", "text": "two blue things", "group": "g"},
        {"id": "c", "image": "0.npz", "text": "the red thing again", "audio": "1.wav"},
        {"id": "d", "audio": "2.wav"},
        {"id": "e", "image": "2.npz", "audio": "gone.wav"},
        {"id": "f", "text": "words alone, naïve"},
        {"id": 7, "image": "3.npz", "split": None},
    ]
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return manifest


def digests(store: Path) -> dict[str, str]:
    """Return the SHA-256 of each file. What names the version of a package is left out."""
    found = {}
    for file in sorted(store.rglob("*")):
        if not file.is_file() or file.name == "lengths.png":  # the image names matplotlib's version
            continue
        content = file.read_bytes()
        if file.name == "report.json":  # truncated samples had another key then
            content = content.replace(b'"truncated":', b'"cut":')
        if file.name == STORE_FILE:
            fields = json.loads(content)
            for name in ("fingerprint", "preparation_key"):
                del fields[name]
            del fields["info"]["created_by"]
            for extractor in fields["extractors"].values():
                extractor.pop("version", None)
            content = json.dumps(fields).encode()
        found[file.relative_to(store).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    prepare(described_store(folder), folder / "store", SETTINGS, workers=1, device="cpu")
    return folder / "store"


def test_every_file_of_a_store_keeps_its_bytes(store: Path) -> None:
    assert digests(store) == FILES


def test_the_preparation_key_keeps_its_formula(store: Path) -> None:
    description = json.loads((store / STORE_FILE).read_text())
    npz = {"name": "npz", "dim": 2048, "num_classes": 1601, "weights_sha256": None, "confidence": 0.2, "min_regions": 10,
           "max_regions": 100}  # fmt: skip
    logmel = {"name": "logmel", "bins": 80, "window_ms": 25, "hop_ms": 10, "floor": 1e-5, "package": "torchaudio",
              "version": version("torchaudio"), "weights_sha256": None}  # fmt: skip
    manifest = description["info"]["manifest_sha256"]
    content = [manifest, HASHED_SETTINGS, {"image": npz, "audio": logmel}]
    expected = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert description["preparation_key"] == expected
