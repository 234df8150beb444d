"""From a manifest to a store with patches and speech frames of encoders: prepared, inspected, read by a model's processor."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.features.extractors import choose
from opt_ds.serving.processor import OPTProcessor
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.processor_files import copy_processor_files
from opt_ds.training.preflight import settle
from tests.decoded import audio_of
from tests.features.models import picture, save_speech, save_vision, speech


def command(*arguments: object) -> int:
    return run_command(_build(), [str(argument) for argument in arguments], "opt-ds")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples of text, image and audio; the pooled patches of SigLIP and the mean of two layers of HuBERT."""
    folder = tmp_path_factory.mktemp("files")
    lines = []
    for number in range(6):
        picture(number, 60 + 10 * number, 60).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", speech(0.5 + 0.1 * number, number), 16_000)
        lines.append({"id": f"s{number}", "image": f"{number}.png", "audio": f"{number}.wav", "text": f"a thing number {number}",
                      "split": "valid" if number == 5 else "train"})  # fmt: skip
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    image, audio = save_vision("siglip", folder / "siglip"), save_speech("hubert", folder / "hubert")
    assert command(
        "prepare", "--manifest", folder / "manifest.jsonl", "--output", folder / "store", "--vocab-size", 40, "--workers", 1,
        "--device", "cpu", "--images", "vit", "--image-weights", image, "--extractor-option", "image.pool=2",
        "--speech", "hf_speech", "--speech-weights", audio, "--extractor-option", "audio.layers=[2, 3]",
    ) == 0  # fmt: skip
    return folder / "store"


def test_the_store_has_the_encoders_sizes_and_passes_inspection(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_store(store).failures == []
    opened = FeatureStore(store)
    dims = opened.description.dims
    assert (dims.image_feature_dim, dims.image_num_classes) == (24, 0)
    assert (dims.audio_feature_dim, dims.audio_frame_rate_hz) == (24, 50)
    assert opened.num_samples == 6
    assert opened.regions(0).features.shape == (4, 24)
    assert opened.regions(0).boxes[3].tolist() == [0.5, 0.5, 1, 1, 0.5, 0.5, 0.25]
    extractors = opened.description.extractors
    assert (extractors["image"]["backbone"], extractors["image"]["side"], extractors["image"]["pool"]) == ("siglip", 32, 2)
    assert (extractors["audio"]["backbone"], extractors["audio"]["layers"]) == ("hubert", [2, 3])
    assert command("inspect", store, "--sample", "s1") == 0
    shown = capsys.readouterr().out
    assert "none (MRC is disabled)" in shown and "class 0" not in shown


def test_training_takes_the_sizes_from_the_store(store: Path) -> None:
    config, _, taken = settle("opt-tiny", [], [str(store)])
    assert (config.model.image_feature_dim, config.model.image_num_classes, config.model.audio_feature_dim) == (24, 0, 24)
    assert "image_feature_dim=24" in str(taken)
    plan = PretrainingPlan(config, [FeatureStore(store)])
    assert plan.disabled_tasks["mrc"].startswith("the store's image regions have no classes")


def test_a_model_of_the_store_reads_raw_files_alike(store: Path, tmp_path: Path) -> None:
    opened = FeatureStore(store)
    copy_processor_files(opened, tmp_path / "processor")
    config, *_ = settle("opt-tiny", ["model.max_frames=512"], [str(store)])
    folder = store.parent
    processor = OPTProcessor(
        tmp_path / "processor", config.model, image_weights=folder / "siglip", speech_weights=folder / "hubert"
    )
    index = [opened.sample_id(number) for number in range(6)].index("s2")
    row = opened.rows[index]
    (regions,) = processor._extractor("image").extract([picture(2, 80, 60)])
    assert np.array_equal(regions.features, opened.regions(row[1]).features)
    sample = processor(image=folder / "2.png", audio=folder / "2.wav")
    assert len(sample.items[1]) == 4 and len(sample.items[2]) > 0
    own = choose("audio", "hf_speech", {"weights": folder / "hubert", "layers": [2, 3]}).build("cpu")
    assert np.array_equal(own.extract([audio_of(folder / "2.wav")])[0], opened.frames(row[2]))
    processor.close()
