"""Labels of image regions by k-means: their clusters, what they are made of, and that later images get the same ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.errors import UserError
from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.ingest.finish import merge_parts
from opt_ds.serving.processor import OPTProcessor
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.clusters import IMAGE_LABELS, Clusters, load_clusters
from opt_ds.store.processor_files import PROCESSOR_FOLDER, copy_processor_files
from opt_ds.store.schema import load_description
from opt_ds.store.writer import StoreWriter
from opt_ds.training.preflight import settle
from tests.ingest.test_pipeline import contents
from tests.logs import logged_lines

UNLABELLED, COLOURS = "tests.extending.extractor:Unlabelled", "tests.extending.extractor:Colours"
SETTINGS = PrepareSettings(images=UNLABELLED, samples_per_shard=3, vocab_size=40)
BY_KMEANS = SETTINGS.model_copy(update={"image_labels": "kmeans:2"})


def command(*arguments: object) -> int:
    return run_command(_build(), [str(argument) for argument in arguments], "opt-ds")


def write_image(path: Path, seed: int) -> None:
    """Write an image of reddish cells if the seed is even, of bluish ones otherwise."""
    pixels = np.random.default_rng(seed).integers(0, 60, (20, 20, 3))
    pixels[..., 2 * (seed % 2)] += 150
    Image.fromarray(pixels.astype("uint8")).save(path)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Eight images: six of split train, two of split valid; one training image is broken."""
    folder = tmp_path / "files"
    folder.mkdir()
    lines = []
    for number in range(9):
        write_image(folder / f"{number}.png", number)
        split = "valid" if number in (3, 7) else "train"
        lines.append({"id": f"s{number}", "image": f"{number}.png", "text": f"thing {number}", "split": split})
    (folder / "8.png").write_bytes((folder / "8.png").read_bytes()[:60])
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "manifest.jsonl"


def make(manifest: Path, output: Path, settings: PrepareSettings = BY_KMEANS, **options: object) -> Path:
    prepare(manifest, output, settings, workers=1, device="cpu", **options)  # type: ignore[arg-type]
    return output


def clusters_of(store: Path) -> Clusters:
    clusters = load_clusters(store, load_description(store).extractors)
    assert clusters is not None
    return clusters


def labels_by_id(path: Path) -> dict[str, list[int]]:
    store = FeatureStore(path)
    return {store.sample_id(n): store.regions(store.rows[n, 1]).labels.tolist() for n in range(store.num_samples)}


def test_each_region_has_the_nearest_cluster_and_mrc_is_trained(manifest: Path, tmp_path: Path) -> None:
    path = make(manifest, tmp_path / "store")
    store, clusters = FeatureStore(path), clusters_of(path)
    for row in range(store.description.num_rows("image")):
        regions = store.regions(row)
        standard = (regions.features.astype("float64") - clusters.mean) / clusters.std
        squares = ((standard[:, None] - clusters.centres.astype("float64")) ** 2).sum(-1)
        assert regions.labels.tolist() == squares.argmin(1).tolist()
    found = labels_by_id(path)
    red, blue = found["s0"][0], found["s1"][0]
    assert red != blue, "the colours are far apart"
    assert all(labels == [(red, blue)[int(id[1:]) % 2]] * 4 for id, labels in found.items()), "also of the valid split"
    assert store.description.dims.image_num_classes == 2
    assert store.description.extractors[IMAGE_LABELS]["num_classes"] == 2
    inspection = inspect_store(path)
    assert inspection.failures == [] and ("image classes", "2 clusters by k-means") in inspection.summary
    config, *_ = settle("opt-tiny", [], [str(path)])
    assert config.model.image_num_classes == 2
    assert "mrc" not in PretrainingPlan(config, [store]).disabled_tasks


def test_only_images_of_the_training_split_shape_the_clusters(manifest: Path, tmp_path: Path) -> None:
    before = clusters_of(make(manifest, tmp_path / "before"))
    features = [FeatureStore(tmp_path / "before").regions(row).features for row in (0, 1, 2, 4, 5, 6)]
    np.testing.assert_allclose(before.mean, np.concatenate(features).astype("float64").mean(0), rtol=1e-5)
    Image.new("RGB", (20, 20), "white").save(manifest.parent / "3.png")
    assert clusters_of(make(manifest, tmp_path / "valid")).fingerprint() == before.fingerprint()
    Image.new("RGB", (20, 20), "white").save(manifest.parent / "4.png")
    assert clusters_of(make(manifest, tmp_path / "train")).fingerprint() != before.fingerprint()


def test_partitions_and_an_interrupted_labelling_make_the_same_bytes(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(make(manifest, tmp_path / "whole"))
    for index in (1, 0):
        make(manifest, tmp_path / "parts", partition=(index, 2))
    merge_parts(tmp_path / "parts")
    assert contents(tmp_path / "parts") == whole
    assert not list(tmp_path.glob("parts.part-*"))

    def stop_after_the_first(writer: StoreWriter, index: int, labels: np.ndarray) -> None:
        if index:
            raise KeyboardInterrupt
        original(writer, index, labels)

    original = StoreWriter.replace_labels
    monkeypatch.setattr(StoreWriter, "replace_labels", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        make(manifest, tmp_path / "stopped")
    monkeypatch.undo()
    assert contents(make(manifest, tmp_path / "stopped")) == whole


def test_a_kill_between_a_shard_and_its_journal_is_repaired(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(make(manifest, tmp_path / "whole"))

    def killed(path: Path, value: object) -> None:
        if path.name == "shard-00001.json" and (tmp_path / "stopped" / "shard-00002.json").exists():
            raise KeyboardInterrupt
        original(path, value)

    import opt_ds.store.writer as writer

    original = writer.write_json
    monkeypatch.setattr(writer, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        make(manifest, tmp_path / "stopped")
    monkeypatch.undo()
    assert contents(make(manifest, tmp_path / "stopped")) == whole


def test_retry_skipped_finds_the_clusters_of_all_images(manifest: Path, tmp_path: Path) -> None:
    store = make(manifest, tmp_path / "store")
    before = clusters_of(store)
    write_image(manifest.parent / "8.png", 8)
    make(manifest, store, retry_skipped=True)
    assert contents(store) == contents(make(manifest, tmp_path / "whole"))
    assert clusters_of(store).fingerprint() != before.fingerprint()
    assert len(list(store.glob("image_clusters-*"))) == 1


def test_a_further_store_takes_the_clusters_of_a_store_or_of_a_run(manifest: Path, tmp_path: Path) -> None:
    first = make(manifest, tmp_path / "first")
    copy_processor_files(FeatureStore(first), tmp_path / "run" / PROCESSOR_FOLDER)
    other = tmp_path / "other"
    other.mkdir()
    write_image(other / "0.png", 21)
    (other / "manifest.jsonl").write_text('{"id": "s0", "image": "0.png", "split": "test"}')
    for number, source in enumerate((first, tmp_path / "run", tmp_path / "run" / PROCESSOR_FOLDER)):
        settings = SETTINGS.model_copy(update={"image_labels": str(source)})
        made = make(other / "manifest.jsonl", tmp_path / f"made-{number}", settings)
        assert clusters_of(made).fingerprint() == clusters_of(first).fingerprint()
        assert labels_by_id(made)["s0"] == labels_by_id(first)["s1"]
    make(other / "manifest.jsonl", tmp_path / "parts", settings, partition=(0, 1))
    shutil.rmtree(tmp_path / "run")
    merge_parts(tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(made), "the partitions have the clusters themselves"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("kmeans", 'write kmeans:K with K from 2 to 32768'),
        ("kmeans:1", 'write kmeans:K with K from 2'),
        ("kmeans:99999", 'write kmeans:K with K from 2'),
        ("k-means:64", 'write kmeans:K with K from 2'),
        ("kmeans:64", 'the images of split "train" have only 24 regions: choose fewer clusters'),
        (".", "neither a store nor a trained model is there"),
    ],
)
def test_labels_that_cannot_be_made_are_one_line(given: str, expected: str, manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--image-labels") as refused:
        make(manifest, tmp_path / "store", SETTINGS.model_copy(update={"image_labels": given}))
    assert expected in str(refused.value)


def test_clusters_are_not_looked_for_without_training_images(manifest: Path, tmp_path: Path) -> None:
    (manifest.parent / "test.jsonl").write_text('{"id": "s0", "image": "0.png", "split": "test"}')
    with pytest.raises(UserError, match='--image-labels kmeans:2: no image is in split "train", whose regions are clustered'):
        make(manifest.parent / "test.jsonl", tmp_path / "store")
    (manifest.parent / "text.jsonl").write_text('{"id": "s0", "text": "a word", "split": "train"}')
    with pytest.raises(UserError, match=r"text\.jsonl names no images: leave it out"):
        make(manifest.parent / "text.jsonl", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_damaged_description_is_one_line(tmp_path: Path) -> None:
    for fingerprint in ({}, {"sha256": "../../x"}, {"sha256": 7}):
        with pytest.raises(UserError, match=r"extractors\.image_labels in its description is damaged"):
            load_clusters(tmp_path, {IMAGE_LABELS: fingerprint})


def test_clusters_of_other_features_are_refused(manifest: Path, tmp_path: Path) -> None:
    plain = make(manifest, tmp_path / "plain", SETTINGS)
    with pytest.raises(UserError, match="its region labels are not by k-means"):
        make(manifest, tmp_path / "b", SETTINGS.model_copy(update={"image_labels": str(plain)}))
    first = make(manifest, tmp_path / "first")
    settings = SETTINGS.model_copy(update={"image_labels": str(first), "extractor_options": {"image": {"side": 3}}})
    with pytest.raises(UserError, match=r"are of features of another image extractor \(side is 2, here 3\)"):
        make(manifest, tmp_path / "c", settings)
    (file,) = first.glob("image_clusters-*")
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="damaged"):
        make(manifest, tmp_path / "d", SETTINGS.model_copy(update={"image_labels": str(first)}))
    assert any("damaged" in failure for failure in inspect_store(first).failures)


def test_an_update_of_the_images_keeps_the_clusters_of_the_same_extractor(manifest: Path, tmp_path: Path) -> None:
    store = make(manifest, tmp_path / "store")
    before = labels_by_id(store)
    shutil.copy(manifest.parent / "0.png", manifest.parent / "1.png")
    arguments = ["update", store, "--modality", "image", "--manifest", manifest, "--workers", 1, "--device", "cpu"]
    assert command(*arguments, "--extractor", UNLABELLED) == 0
    assert labels_by_id(store) == {**before, "s1": before["s0"]}
    assert inspect_store(store).failures == []
    with logged_lines() as logged:
        assert command(*arguments, "--extractor", COLOURS) == 0
    assert any("the labels by k-means were removed" in line for line in logged)
    assert IMAGE_LABELS not in load_description(store).extractors and not list(store.glob("image_clusters-*"))
    assert {label for labels in labels_by_id(store).values() for label in labels} == {0}


def test_a_finished_store_is_labelled_by_update(manifest: Path, tmp_path: Path) -> None:
    store, fresh = make(manifest, tmp_path / "store", SETTINGS), make(manifest, tmp_path / "fresh")
    assert command("update", store, "--modality", "image_labels", "--extractor", "kmeans:2") == 0
    assert labels_by_id(store) == labels_by_id(fresh)
    assert clusters_of(store).fingerprint() == clusters_of(fresh).fingerprint()
    assert inspect_store(store).failures == []
    assert command("update", store, "--modality", "image_labels", "--extractor", "kmeans:3") == 0
    assert load_description(store).dims.image_num_classes == 3 and len(list(store.glob("image_clusters-*"))) == 1
    next(store.glob("image_clusters-*")).unlink()
    assert command("update", store, "--modality", "image_labels", "--extractor", fresh) == 0, "the remedy of a missing file"
    assert labels_by_id(store) == labels_by_id(fresh)


def test_a_model_labels_raw_images_with_the_clusters_of_its_store(manifest: Path, tmp_path: Path) -> None:
    path = make(manifest, tmp_path / "store")
    copy_processor_files(FeatureStore(path), tmp_path / "processor")
    config, *_ = settle("opt-tiny", [], [str(path)])
    processor = OPTProcessor(tmp_path / "processor", config.model)
    for number in (0, 1):
        sample = processor(image=manifest.parent / f"{number}.png")
        assert sample.items[1].labels.tolist() == labels_by_id(path)[f"s{number}"]
    processor.close()


def test_the_classes_of_an_extractor_are_replaced_with_a_warning(manifest: Path, tmp_path: Path) -> None:
    settings = BY_KMEANS.model_copy(update={"images": COLOURS})
    with logged_lines() as logged:
        path = make(manifest, tmp_path / "store", settings)
    assert any(line == f"--image-labels kmeans:2 replaces the 2 classes of {COLOURS}" for line in logged)
    assert len({label for labels in labels_by_id(path).values() for label in labels}) == 2


def test_stores_without_these_labels_keep_their_key_and_their_files(manifest: Path, tmp_path: Path) -> None:
    assert "image_labels" not in SETTINGS.hashed()
    path = make(manifest, tmp_path / "store", SETTINGS)
    assert not list(path.glob("image_clusters-*")) and IMAGE_LABELS not in load_description(path).extractors
