"""A modality that opt_ds does not know, with the extractor of another package: prepared, resumed, retried and updated."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from opt_ds.config import load_config
from opt_ds.errors import UserError
from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.ingest.file_features import Failure, FileFeatures
from opt_ds.ingest.finish import merge_parts
from opt_ds.ingest.manifest import read_manifest
from opt_ds.ingest.report import REPORT_FILE
from opt_ds.ingest.update import update_modality
from opt_ds.registry import EXTRACTORS, PLUGINS_VARIABLE
from opt_ds.serving.processor import OPTProcessor
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.processor_files import copy_processor_files
from tests.extending.test_extractor import LOUDNESS, command, sample
from tests.ingest.test_pipeline import contents

TOUCH = "tests.extending.extractor:Touch"
SETTINGS = PrepareSettings(
    images="npz", speech=LOUDNESS, extractors={"touch": TOUCH}, extractor_options={"touch": {"scale": 2}}, vocab_size=40,
    samples_per_shard=3,
)  # fmt: skip
QUIET: dict[str, Any] = {"workers": 1, "device": "cpu"}


def readings(count: int) -> str:
    return "\n".join(f"{10 * row},{row},{row + 0.5},{count}" for row in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples: touch alone, with text and audio, a file twice, one without touch; one file is missing, one broken."""
    folder = tmp_path_factory.mktemp("touch")
    for name, count in (("a", 3), ("b", 5), ("late", 2)):
        (folder / f"{name}.csv").write_text(readings(count))
    (folder / "late.csv").rename(folder / "late.csv.away")
    (folder / "broken.csv").write_text("1,2\nthree")
    soundfile.write(folder / "a.wav", np.full(16_000, 0.1), 16_000)
    lines = [
        {"id": "alone", "touch": "a.csv"},
        {"id": "all", "touch": "b.csv", "text": "some words", "audio": "a.wav"},
        {"id": "again", "touch": "a.csv", "text": "other words"},
        {"id": "text", "text": "words alone", "touch": None},
        {"id": "late", "touch": "late.csv", "text": "late words"},
        {"id": "broken", "touch": "broken.csv"},
    ]
    for line in lines:
        line["split"] = "train"
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    options = ("--images", "npz", "--speech", LOUDNESS, "--extractor", f"touch={TOUCH}", "--extractor-option", "touch.scale=2",
               "--vocab-size", "40", "--samples-per-shard", "3", "--workers", "1", "--device", "cpu")  # fmt: skip
    assert command("prepare", "--manifest", folder / "manifest.jsonl", "--output", folder / "store", *options) == 0
    return folder / "store"


def test_the_store_has_its_columns_and_its_sample_rows(store: Path) -> None:
    opened = FeatureStore(store)
    assert inspect_store(store).failures == []
    assert opened.modalities == ("text", "image", "audio", "touch")
    assert [opened.sample_id(index) for index in range(opened.num_samples)] == ["alone", "all", "again", "text"]
    assert sample(opened, "alone").tolist()[:3] == [-1, -1, -1]
    assert sample(opened, "again")[3] == sample(opened, "alone")[3], "one file, one row"
    assert sample(opened, "text")[3] == -1
    columns = opened.columns("touch", sample(opened, "all")[3])
    assert columns["at_ms"].tolist() == [0, 10, 20, 30, 40]
    assert columns["features"][2].tolist() == [4.0, 5.0, 10.0], "with the scale of its option"
    assert opened.description.further["touch"].item == "readings"
    fingerprint = {"name": "touch_csv", "version": "1.0", "scale": 2.0, "plugin": TOUCH}
    assert opened.description.extractors["touch"] == fingerprint


def test_a_broken_file_costs_its_sample_and_the_report_counts_the_modality(store: Path) -> None:
    report = json.loads((store / REPORT_FILE).read_text())
    reasons = {entry["id"]: entry["reason"] for entry in report["skipped_samples"]}
    assert set(reasons) == {"late", "broken"}
    assert reasons["late"] == "touch file is missing: late.csv"
    assert reasons["broken"].startswith("no touch features could be made: ")
    assert report["lengths"]["touch"]["rows"] == 2 and report["lengths"]["touch"]["max"] == 5


def test_a_store_made_in_parts_takes_in_a_file_that_was_missing(store: Path, folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    for index in range(2):
        prepare(own / "manifest.jsonl", own / "parts", SETTINGS, share=(index, 2), **QUIET)
    merge_parts(own / "parts")
    assert contents(own / "parts") == contents(store)
    (own / "late.csv.away").rename(own / "late.csv")
    prepare(own / "manifest.jsonl", own / "parts", SETTINGS, retry_skipped=True, **QUIET)
    assert sample(FeatureStore(own / "parts"), "late")[3] >= 0
    prepare(own / "manifest.jsonl", own / "at-once", SETTINGS, **QUIET)
    assert contents(own / "parts") == contents(own / "at-once")


def test_update_replaces_it_and_adds_it_to_a_store_without(store: Path, folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(store, tmp_path / "store"))
    options = ("--manifest", folder / "manifest.jsonl", "--modality", "touch", "--extractor", TOUCH, "--workers", "1")
    assert command("update", own, *options, "--extractor-option", "touch.scale=1") == 0
    opened = FeatureStore(own)
    assert inspect_store(own).failures == []
    assert opened.columns("touch", sample(opened, "all")[3])["features"][2].tolist() == [2.0, 2.5, 5.0]
    assert opened.caption(sample(opened, "all")[0]) == "some words"
    update_modality(own, folder / "manifest.jsonl", "audio", PrepareSettings(speech=LOUDNESS), **QUIET)
    assert sample(FeatureStore(own), "all")[3] >= 0, "the manifest's fields of further modalities are known"

    plain = tmp_path / "plain.jsonl"
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    plain.write_text("\n".join(json.dumps({"id": x["id"], "text": x["text"], "split": "train"}) for x in lines if "text" in x))
    prepare(plain, tmp_path / "added", PrepareSettings(images="npz", vocab_size=40), **QUIET)
    update_modality(tmp_path / "added", folder / "manifest.jsonl", "touch", SETTINGS, **QUIET)
    added = FeatureStore(tmp_path / "added")
    assert inspect_store(tmp_path / "added").failures == []
    assert added.modalities[3:] == ("touch",)
    assert (sample(added, "all")[3] >= 0, sample(added, "text")[3]) == (True, -1)
    report = json.loads((tmp_path / "added" / REPORT_FILE).read_text())
    assert [entry["id"] for entry in report["dropped"]["touch"]] == ["late"]


def test_a_models_processor_reads_its_files_once_the_user_allows_it(
    store: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = FeatureStore(store)
    copy_processor_files(opened, tmp_path / "processor")
    sizes = ("vocab_size", "image_feature_dim", "audio_feature_dim", "image_num_classes")
    config = load_config("opt-tiny", [f"model.{size}={getattr(opened.description.dims, size)}" for size in sizes])
    monkeypatch.setattr(EXTRACTORS, "_allowed", set())
    processor = OPTProcessor(tmp_path / "processor", config.model)
    with pytest.raises(UserError, match=f"the model's touch extractor: extractor {TOUCH}: a file names it.*{PLUGINS_VARIABLE}"):
        processor.columns("touch", folder / "b.csv")
    monkeypatch.setenv(PLUGINS_VARIABLE, TOUCH)
    found = processor.columns("touch", folder / "b.csv")
    stored = opened.columns("touch", sample(opened, "all")[3])
    assert found.keys() == stored.keys()
    assert all(np.array_equal(found[name], stored[name]) and found[name].dtype == stored[name].dtype for name in found)
    for file, expected in (("broken.csv", r"touch broken.csv: cannot be read \(.*\): give another file"), ("x", "no such file")):
        with pytest.raises(UserError, match=expected) as error:
            processor.columns("touch", folder / file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"tuoch": "a.csv"}, r'unknown field "tuoch" \(did you mean "touch"\?\)'),
        ({"touch": 3}, "field touch: give a file's name in quotes"),
        ({"touch": "../a.csv"}, 'touch "../a.csv" is outside the manifest\'s folder'),
        ({}, "none of image, text, audio, touch: a sample needs at least one"),
    ],
)
def test_a_bad_field_is_one_line(field: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"id": "a", **field}))
    with pytest.raises(UserError, match=expected):
        read_manifest(tmp_path / "m.jsonl", further=["touch"])


def test_a_manifest_without_further_fields_keeps_its_hash(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"id": "a", "text": "words"}')
    assert read_manifest(tmp_path / "m.jsonl", further=["touch"]).sha256 == read_manifest(tmp_path / "m.jsonl").sha256
    (tmp_path / "n.jsonl").write_text('{"id": "a", "text": "words", "touch": "a.csv"}')
    assert read_manifest(tmp_path / "n.jsonl", further=["touch"]).sha256 != read_manifest(tmp_path / "m.jsonl").sha256
    with pytest.raises(UserError, match='unknown field "touch"'):
        read_manifest(tmp_path / "n.jsonl")


@pytest.mark.parametrize(
    ("extractors", "expected"),
    [
        ({"image": TOUCH}, "--extractor image: name the extractor with --images"),
        ({"samples": TOUCH}, '"samples" is a name of the store\'s own: choose another name'),
        ({"split": TOUCH}, '"split" is a field of manifests: choose another name'),
        ({"to/uch": TOUCH}, "a name has 1 to 32 letters"),
        ({"smell": TOUCH}, "Touch makes features of touch, not of smell: name it with --extractor touch"),
        ({"touch": LOUDNESS}, "Loudness makes features of audio, not of touch: name it with --speech"),
        ({"touch": "tests.extending.extractor:Wrong"}, 'extractor touch_csv: columns: .*"features" of dtype float16'),
    ],
)
def test_a_wrong_modality_is_one_line(extractors: dict[str, str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"id": "a", "text": "words", "split": "train"}')
    with pytest.raises(UserError, match=expected) as error:
        prepare(tmp_path / "m.jsonl", tmp_path / "s", PrepareSettings(images="npz", extractors=extractors), **QUIET)
    assert "\n" not in str(error.value)


def test_columns_that_the_store_does_not_have_cost_the_file(folder: Path, tmp_path: Path) -> None:
    settings = PrepareSettings(extractors={"touch": "tests.extending.extractor:Labelled"})
    features = FileFeatures({"touch": settings.extractor("touch")}, settings, "cpu")
    (result,) = features.chunk("touch", ["a.csv"], folder)
    assert isinstance(result, Failure)
    assert result.reason == "touch features cannot be stored: columns features, at_ms, labels, not features, at_ms"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--extractor", "touch"), "write it as KIND=NAME"),
        (("--extractor", f"touch={TOUCH}", "--extractor", "touch=other"), "--extractor touch is given twice"),
        (("--extractor", f"touch={TOUCH}", "--extractor-option", "touch.sclae=3"), r'unknown key "sclae" \(did you mean "scale"'),
        (("--extractor", f"touch={TOUCH}", "--extractor-option", "tuoch.scale=3"), r'no modality "tuoch" \(did you mean "touch"'),
    ],
)
def test_a_malformed_option_is_one_line(
    options: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "m.jsonl").write_text('{"id": "a", "text": "words"}')
    assert command("prepare", "--manifest", tmp_path / "m.jsonl", "--output", tmp_path / "s", "--images", "npz", *options) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(expected, said) and "\n" not in said
