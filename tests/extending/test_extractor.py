"""Extractors in a file of their own, `extractor.py`: prepared, updated, trained on, exported, and used on raw files."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.errors import UserError
from opt_ds.features.extractors import choose, named_in
from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.ingest.report import REPORT_FILE
from opt_ds.ingest.update import update_modality
from opt_ds.registry import EXTRACTORS, PLUGINS_VARIABLE
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.processor_files import check_fingerprints, copy_processor_files
from tests.training.runs import rank_environment

ROOT = Path(__file__).parents[2]
COLOURS, LOUDNESS = "tests.extending.extractor:Colours", "tests.extending.extractor:Loudness"
OPTIONS = ("image.side=3", "image.weights={weights}", "audio.bands=[0.25, 1.0, 2.0]", "audio.frames_per_s=20")
GOOD = ["a", "b", "c", "d"]


def command(*arguments: object) -> int:
    return run_command(_build(), [str(argument) for argument in arguments], "opt-ds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples: one image ends the process that extracts it, another one makes the extractor raise."""
    folder = tmp_path_factory.mktemp("files")
    lines = []
    for number, name in enumerate([*GOOD, "crash", "fail"]):
        image = Image.new("RGB", (30, 30), (40 * number, 200 - 30 * number, 90))
        image.putpixel((0, 0), {"crash": (1, 2, 3), "fail": (3, 2, 1)}.get(name, (9, 9, 9)))
        image.save(folder / f"{name}.png")
        soundfile.write(folder / f"{name}.wav", np.full(16_000, 0.1 * (number + 1)), 16_000)
        lines.append({"id": name, "image": f"{name}.png", "text": f"a thing {name}", "audio": f"{name}.wav",
                      "split": "valid" if name == "d" else "train"})  # fmt: skip
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "weights.txt").write_text("0.5")
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    """Their store, prepared by the command with two workers."""
    output = folder / "store"
    options = [part for option in OPTIONS for part in ("--extractor-option", option.format(weights=folder / "weights.txt"))]
    assert command("prepare", "--manifest", folder / "manifest.jsonl", "--output", output, "--images", COLOURS,
                   "--speech", LOUDNESS, *options, "--vocab-size", "40", "--workers", "2", "--device", "cpu") == 0  # fmt: skip
    return output


def sample(store: FeatureStore, name: str) -> np.ndarray:
    return store.rows[[store.sample_id(index) for index in range(store.num_samples)].index(name)]


def test_files_are_extracted_with_its_options_and_a_crash_costs_one_file(store: Path, folder: Path) -> None:
    opened = FeatureStore(store)
    assert inspect_store(store).failures == []
    assert [opened.sample_id(index) for index in range(opened.num_samples)] == GOOD
    reasons = {entry["id"]: entry["reason"] for entry in json.loads((store / REPORT_FILE).read_text())["skipped_samples"]}
    assert "crash.png: it ends the worker process" in reasons["crash"]
    assert reasons["fail"] == "no image features could be made: too dark"
    row = sample(opened, "c")
    regions = opened.regions(row[1])
    assert regions.features.shape == (9, 3)
    assert np.allclose(regions.features[4], np.array([80, 140, 90]) / 255 + 0.5, atol=2e-3), "the brightness of the weights"
    assert np.allclose(opened.frames(row[2]), np.tile([0.075, 0.3, 0.6], (20, 1)), atol=1e-3)
    assert opened.description.dims.audio_frame_rate_hz == 20


def test_the_fingerprint_has_its_options_and_how_it_was_named(store: Path) -> None:
    extractors = FeatureStore(store).description.extractors
    assert extractors["image"]["plugin"] == COLOURS and extractors["image"]["side"] == 3
    assert len(extractors["image"]["weights_sha256"]) == 64 and "weights" not in extractors["image"], "no path"
    assert extractors["audio"] == {
        "name": "loudness", "weights_sha256": None, "frames_per_s": 20, "bands": [0.25, 1.0, 2.0], "plugin": LOUDNESS,
    }  # fmt: skip


@pytest.fixture(scope="module")
def updated(store: Path, folder: Path) -> Path:
    """The store with audio features of other options."""
    own = Path(shutil.copytree(store, folder / "updated"))
    assert command("update", own, "--manifest", folder / "manifest.jsonl", "--modality", "audio", "--extractor", LOUDNESS,
                   "--extractor-option", "audio.frames_per_s=5", "--workers", "1", "--device", "cpu") == 0  # fmt: skip
    return own


def test_update_replaces_a_modality(store: Path, updated: Path) -> None:
    opened = FeatureStore(updated)
    assert inspect_store(updated).failures == []
    assert opened.frames(0).shape == (5, 2) and opened.description.extractors["audio"]["frames_per_s"] == 5
    assert np.array_equal(opened.regions(0).features, FeatureStore(store).regions(0).features)


def test_update_adds_a_modality(folder: Path, tmp_path: Path) -> None:
    without = tmp_path / "without.jsonl"
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    without.write_text("\n".join(json.dumps({key: line[key] for key in ("id", "text", "split")}) for line in lines))
    prepare(without, tmp_path / "s", PrepareSettings(images="npz", vocab_size=40), workers=1, device="cpu")
    lines[4]["image"] = "d.png"  # not the file that ends the process
    (folder / "images.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = PrepareSettings(images=COLOURS)
    update_modality(tmp_path / "s", folder / "images.jsonl", "image", settings, workers=1, device="cpu")
    filled = FeatureStore(tmp_path / "s")
    assert sample(filled, "a")[1] >= 0 and sample(filled, "fail")[1] == -1, "a failure leaves the sample its text"
    assert sample(filled, "crash")[1] == sample(filled, "d")[1], "one file, one row"
    assert filled.regions(sample(filled, "a")[1]).features.shape == (4, 3)


def test_a_store_of_another_fingerprint_is_refused(store: Path, updated: Path, tmp_path: Path) -> None:
    copy_processor_files(FeatureStore(store), tmp_path / "processor")
    check_fingerprints(tmp_path / "processor", FeatureStore(store), force=False)
    with pytest.raises(UserError, match="its audio features come from another extractor than the model's"):
        check_fingerprints(tmp_path / "processor", FeatureStore(updated), force=False)


@pytest.fixture(scope="module")
def model(store: Path, folder: Path) -> Path:
    """An exported model of two training steps on the store."""
    dims = FeatureStore(store).description.dims
    settings = (
        f"model.vocab_size={dims.vocab_size}", "model.image_feature_dim=3", "model.image_num_classes=2",
        "model.audio_feature_dim=3", "train.max_steps=2", "batch.size=4", "train.image_grid=0", "train.validate_every=1000",
    )  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    run = [sys.executable, str(ROOT / "opt_ds" / "pretrain.py"), "--config", "opt-tiny", "--store", str(store),
           "--output", str(folder / "run"), *options]  # fmt: skip
    done = subprocess.run(run, env=rank_environment(0, 1, 0), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert command("export", "--checkpoint", folder / "run", "--output", folder / "model") == 0
    return folder / "model"


def read(model: Path, folder: Path, allowed: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Load the exported model in a process of its own, read sample c, and print its first region and frame."""
    weights = "" if "no weights" in options else f", image_weights={str(folder / 'weights.txt')!r}"
    code = (
        f"import opt_ds; model = opt_ds.load({str(model)!r}, device='cpu'{weights}); processor = model._session.processor\n"
        f"sample = processor('words', {str(folder / 'c.png')!r}, {str(folder / 'c.wav')!r})\n"
        "print('text alone works', processor('words') is not None)\n"
        "print(processor._extractor('image').fingerprint()['name'], processor._extractor('audio').dim)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), PLUGINS_VARIABLE: allowed}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_an_exported_model_reads_raw_files_with_them_once_the_user_allows_it(model: Path, folder: Path) -> None:
    done = read(model, folder, f"{COLOURS},{LOUDNESS}")
    assert done.stdout.splitlines() == ["text alone works True", "colours 3"], done.stderr
    refused = read(model, folder, LOUDNESS)
    assert f"the model's image extractor: extractor {COLOURS}: a file names it" in refused.stderr.splitlines()[-1]
    missing = read(model, folder, f"{COLOURS},{LOUDNESS}", "no weights")
    assert "name their file with --image-weights" in missing.stderr.splitlines()[-1]


def test_the_model_is_given_the_stores_features(model: Path, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import opt_ds

    monkeypatch.setenv(PLUGINS_VARIABLE, f"{COLOURS},{LOUDNESS}")
    processor = opt_ds.load(model, device="cpu", image_weights=folder / "weights.txt")._session.processor
    opened = FeatureStore(store)
    row = sample(opened, "c")
    (regions,) = processor._extractor("image").extract([Image.open(folder / "c.png").convert("RGB")])
    assert np.array_equal(regions.features, opened.regions(row[1]).features), "with the options of the fingerprint"
    (folder / "other.txt").write_text("0.25")
    other = opt_ds.load(model, device="cpu", image_weights=folder / "other.txt")._session.processor
    with pytest.raises(UserError, match=r"image extractor colours: its weights_sha256 is .* the model was trained with"):
        other(image=folder / "c.png")
    for options, expected in (
        ({"image": {"side": 4}}, "its side is 4, the model was trained with 3"),
        ({"text": {"side": 4}}, 'the model has no extractor of "text"'),
        ({"imag": {}}, r'the model has no extractor of "imag" \(did you mean "image"\?\)'),
    ):
        with pytest.raises(UserError, match=expected):
            opt_ds.load(model, device="cpu", image_weights=folder / "weights.txt", extractor_options=options)._session.processor(
                image=folder / "c.png"
            )
    with pytest.raises(UserError, match='no modality "touch": the model has extractors of image, audio'):
        processor.columns("touch", folder / "c.png")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"images": "colurs"}, '--images: no extractor "colurs"'),
        ({"images": "faster_rcn"}, r'--images: no extractor "faster_rcn" \(did you mean "faster_rcnn"\?\)'),
        ({"images": "tests.extending.missing:Colours"}, 'no module "tests.extending.missing"'),
        ({"images": "tests.extending.extractor:Colors"}, 'the module has no class "Colors"'),
        ({"images": "tests.extending.extractor:ColourOptions"}, "is no subclass of opt_ds.features.extractors.Extractor"),
        ({"images": LOUDNESS}, "makes features of audio, not of image: name it with --speech"),
        ({"images": COLOURS, "extractor_options": {"image": {"sied": 3}}}, r'unknown key "sied" \(did you mean "side"\?\)'),
        ({"images": COLOURS, "extractor_options": {"image": {"side": 9}}}, "side: must be at most 8 .found 9."),
        ({"images": COLOURS, "image_backbone": "resnet50"}, "--image-backbone: .*Colours has no option backbone: leave it out"),
        ({"images": COLOURS, "image_weights": Path("a"), "extractor_options": {"image": {"weights": "b"}}},
         "--image-weights and --extractor-option image.weights are the same option"),
        ({"images": "npz", "image_weights": Path("a")}, "--image-weights: npz has no option weights: leave it out"),
        ({"extractor_options": {"imgae": {}}}, r'no modality "imgae" \(did you mean "image"\?\)'),
    ],
)  # fmt: skip
def test_a_wrong_name_or_option_is_one_line(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        PrepareSettings(**settings).extractor("image")  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("side=3", "write it as KIND.KEY=VALUE"),
        ("image.side", "write it as KIND.KEY=VALUE"),
        ("image.side=[3", "--extractor-option image.side=.*not readable as YAML"),
        ("touch.side=3", 'no modality "touch"'),
    ],
)
def test_a_malformed_option_is_one_line(option: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"id": "a", "text": "words"}')
    arguments = ("prepare", "--manifest", tmp_path / "m.jsonl", "--output", tmp_path / "s", "--extractor-option", option)
    assert command(*arguments) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(expected, said) and "\n" not in said


def test_an_option_that_the_extractor_lacks_is_warned_of_once(logged: list[str]) -> None:
    PrepareSettings(images="npz", image_min_side=500).extractor("image")
    assert logged == ["--image-min-side 500 is not used: npz has no option min_side"]


def test_an_installed_package_announces_extractors(monkeypatch: pytest.MonkeyPatch) -> None:
    announced = [EntryPoint("colours", COLOURS, "opt_ds.features"), EntryPoint("own-loudness", LOUDNESS, "opt_ds.features")]
    monkeypatch.setattr("opt_ds.registry.entry_points", lambda group: announced if group == "opt_ds.features" else [])
    monkeypatch.setattr(EXTRACTORS, "_allowed", set())
    colours = choose("image", "colours", {"side": 4})
    assert "plugin" not in colours.complete_fingerprint(colours.build("cpu"))
    loudness = PrepareSettings(speech="own-loudness").extractor("audio")
    fingerprint = loudness.complete_fingerprint(loudness.build("cpu"))
    assert (fingerprint["name"], named_in(fingerprint)) == ("loudness", "own-loudness"), "it is found again by this name"
    with pytest.raises(UserError, match=r'no extractor "colour" \(did you mean "colours"\?\)'):
        choose("image", "colour", {})


def test_a_file_alone_cannot_name_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXTRACTORS, "_allowed", set())
    with pytest.raises(UserError, match=f"set the environment variable {PLUGINS_VARIABLE}={COLOURS}"):
        choose("image", COLOURS, {})
