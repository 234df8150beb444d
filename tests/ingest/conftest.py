"""A small corpus of typical files: every kind of image and audio, and some that are broken."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from opt_ds.ingest import PrepareSettings, prepare

SETTINGS = PrepareSettings(samples_per_shard=3, vocab_size=80)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle cx="4" cy="4" r="4" fill="#00f"/></svg>'


@pytest.fixture(scope="session")
def messy_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples, of which five are broken in different ways; two share an image."""
    folder = tmp_path_factory.mktemp("messy")
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (40, 60, 3), "uint8"))
    image.save(folder / "rgb.jpg")
    image.convert("P").save(folder / "palette.png")
    image.convert("LA").save(folder / "grey.png")
    image.save(folder / "a.webp")
    (folder / "drawn.svg").write_text(SVG)
    (folder / "cut.jpg").write_bytes((folder / "rgb.jpg").read_bytes()[:200])
    wave = 0.3 * np.sin(np.arange(12000) / 9)
    soundfile.write(folder / "mono.wav", wave, 8000)
    soundfile.write(folder / "stereo.flac", np.stack([wave, -0.5 * wave], 1), 44100)
    soundfile.write(folder / "a.ogg", wave, 16000)
    (folder / "noise.wav").write_bytes(b"RIFF" + bytes(40))
    lines = [
        {"id": "ok-1", "image": "rgb.jpg", "text": "A red thing", "audio": "mono.wav", "labels": ["b", "a"]},
        {"id": "ok-2", "image": "palette.png", "text": "naïve café 猫"},
        {"id": "bad-image", "image": "cut.jpg", "text": "cut off"},
        {"id": "ok-3", "image": "rgb.jpg", "text": "The same picture again", "audio": "stereo.flac"},
        {"id": "no-image", "image": "gone.png", "text": "gone"},
        {"id": "ok-4", "audio": "a.ogg"},
        {"id": "bad-audio", "text": "noise", "audio": "noise.wav"},
        {"id": "no-audio", "image": "a.webp", "audio": "gone.wav"},
        {"id": "empty", "text": " \u200b "},
        {"id": "ok-5", "image": "drawn.svg"},
        {"id": "ok-6", "image": "grey.png", "text": "grey", "labels": ["a"]},
        {"id": "ok-7", "text": "words alone", "image": "a.webp"},
    ]
    for line in lines:
        line["split"] = "valid" if line["id"] == "ok-6" else "train"
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return manifest


@pytest.fixture(scope="session")
def messy_store(messy_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of those samples, for reading only."""
    output = tmp_path_factory.mktemp("messy_store") / "store"
    prepare(messy_manifest, output, SETTINGS, workers=2, device="cpu")
    return output


@pytest.fixture
def own_store(messy_store: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(messy_store, tmp_path / "s")
    return tmp_path / "s"
