"""Labels of image regions by k-means: their clusters, what they are made of, and that later images get the same ones."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.errors import UserError
from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.ingest.finish import merge_parts
from opt_ds.ingest.image_labels import find_clusters, label_shards, update_image_labels
from opt_ds.serving.processor import OPTProcessor
from opt_ds.store import FeatureStore, inspect_store, open_store, writer
from opt_ds.store.clusters import IMAGE_LABELS, Clusters, load_clusters
from opt_ds.store.processor_files import PROCESSOR_FOLDER, copy_processor_files
from opt_ds.store.schema import load_description
from opt_ds.store.synthetic import write_synthetic_store
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


def write_manifest(folder: Path) -> Path:
    """Write nine images: seven of split train, of which one is broken, and two of split valid."""
    folder.mkdir()
    lines = []
    for number in range(9):
        write_image(folder / f"{number}.png", number)
        split = "valid" if number in (3, 7) else "train"
        lines.append({"id": f"s{number}", "image": f"{number}.png", "text": f"thing {number}", "split": split})
    (folder / "8.png").write_bytes((folder / "8.png").read_bytes()[:60])
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("corpus") / "files")


@pytest.fixture(scope="module")
def plain(manifest: Path) -> Path:
    """The store without classes. Tests that change it copy it."""
    return make(manifest, manifest.parents[1] / "plain", SETTINGS)


@pytest.fixture(scope="module")
def labelled(manifest: Path) -> Path:
    """The store with two clusters. Tests that change it copy it."""
    return make(manifest, manifest.parents[1] / "labelled")


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


def test_each_region_has_the_nearest_cluster_and_mrc_is_trained(labelled: Path) -> None:
    store, clusters = FeatureStore(labelled), clusters_of(labelled)
    for row in range(store.description.num_rows("image")):
        regions = store.regions(row)
        standard = (regions.features.astype("float64") - clusters.mean) / clusters.std
        squares = ((standard[:, None] - clusters.centres.astype("float64")) ** 2).sum(-1)
        assert regions.labels.tolist() == squares.argmin(1).tolist()
    found = labels_by_id(labelled)
    red, blue = found["s0"][0], found["s1"][0]
    assert red != blue, "the colours are far apart"
    assert all(labels == [(red, blue)[int(id[1:]) % 2]] * 4 for id, labels in found.items()), "also of the valid split"
    assert store.description.dims.image_num_classes == 2
    assert store.description.extractors[IMAGE_LABELS]["num_classes"] == 2
    inspection = inspect_store(labelled)
    assert inspection.failures == [] and ("image classes", "2 clusters by k-means") in inspection.summary
    config, *_ = settle("opt-tiny", [], [str(labelled)])
    assert config.model.image_num_classes == 2
    assert "mrc" not in PretrainingPlan(config, [store]).disabled_tasks


def test_only_images_of_the_training_split_shape_the_clusters(plain: Path, labelled: Path) -> None:
    store, clusters = FeatureStore(plain), clusters_of(labelled)
    train = [store.regions(row).features for row in (0, 1, 2, 4, 5, 6)]
    np.testing.assert_allclose(clusters.mean, np.concatenate(train).astype("float64").mean(0), rtol=1e-5)
    files, names = [store.shard(index) for index in range(len(store.description.shards))], store.description.split_names
    own = find_clusters(files, names, clusters.extractor, 2, "here")
    assert own.fingerprint() == clusters.fingerprint()
    assert find_clusters(files, names[::-1], clusters.extractor, 2, "here").fingerprint() != own.fingerprint(), "valid as train"


def test_partitions_make_the_same_bytes(manifest: Path, labelled: Path, tmp_path: Path) -> None:
    for index in (1, 0):
        make(manifest, tmp_path / "parts", partition=(index, 2))
    merge_parts(tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(labelled)
    assert not list(tmp_path.glob("parts.part-*"))


def test_an_interrupted_labelling_resumes_and_replaces_the_classes_of_an_extractor(
    manifest: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First between two shards, then between a shard and its journal. The features are those of `labelled`."""
    settings, output = BY_KMEANS.model_copy(update={"images": COLOURS}), tmp_path / "store"

    def stop_at_the_second(own: StoreWriter, index: int, labels: np.ndarray) -> None:
        if index:
            raise KeyboardInterrupt
        replace_labels(own, index, labels)

    replace_labels = StoreWriter.replace_labels
    monkeypatch.setattr(StoreWriter, "replace_labels", stop_at_the_second)
    with logged_lines() as logged, pytest.raises(KeyboardInterrupt):
        make(manifest, output, settings)
    assert any(line == f"--image-labels kmeans:2 replaces the 2 classes of {COLOURS}" for line in logged)
    monkeypatch.undo()

    def stop_before_the_journal(path: Path, value: object) -> None:
        if path.name == "shard-00001.json":
            raise KeyboardInterrupt
        write_json(path, value)

    write_json = writer.write_json
    monkeypatch.setattr(writer, "write_json", stop_before_the_journal)
    with pytest.raises(KeyboardInterrupt):
        make(manifest, output, settings)
    monkeypatch.undo()
    found, expected = contents(make(manifest, output, settings)), contents(labelled)
    assert {name for name in expected if name.startswith("shard-")} == {name for name in found if name.startswith("shard-")}
    assert all(found[name] == expected[name] for name in expected if name.startswith("shard-"))
    assert inspect_store(output).failures == []


@pytest.mark.faults
def test_retry_skipped_finds_the_clusters_of_all_images(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "files")
    store = make(manifest, tmp_path / "store")
    before = clusters_of(store)
    write_image(manifest.parent / "8.png", 8)
    make(manifest, store, retry_skipped=True)
    assert contents(store) == contents(make(manifest, tmp_path / "whole"))
    assert clusters_of(store).fingerprint() != before.fingerprint()
    assert len(list(store.glob("image_clusters-*"))) == 1


def test_the_clusters_of_a_store_a_run_or_a_model_label_another_store(plain: Path, labelled: Path, tmp_path: Path) -> None:
    copy_processor_files(FeatureStore(labelled), tmp_path / "run" / PROCESSOR_FOLDER)
    store = tmp_path / "store"
    shutil.copytree(plain, store)
    for source in (labelled, tmp_path / "run", tmp_path / "run" / PROCESSOR_FOLDER):
        assert command("update", store, "--modality", "image_labels", "--extractor", source) == 0
        assert clusters_of(store).fingerprint() == clusters_of(labelled).fingerprint()
        assert labels_by_id(store) == labels_by_id(labelled)


@pytest.mark.faults
def test_partitions_have_the_clusters_of_another_store_themselves(manifest: Path, labelled: Path, tmp_path: Path) -> None:
    shutil.copytree(labelled, tmp_path / "first")
    (manifest.parent / "other.jsonl").write_text('{"id": "s0", "image": "1.png", "split": "test"}')
    settings = SETTINGS.model_copy(update={"image_labels": str(tmp_path / "first")})
    whole = make(manifest.parent / "other.jsonl", tmp_path / "whole", settings)
    assert labels_by_id(whole)["s0"] == labels_by_id(labelled)["s1"]
    make(manifest.parent / "other.jsonl", tmp_path / "parts", settings, partition=(0, 1))
    shutil.rmtree(tmp_path / "first")
    merge_parts(tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(whole)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("kmeans", "write kmeans:K with K from 2 to 32768"),
        ("kmeans:1", "write kmeans:K with K from 2"),
        ("kmeans:99999", "write kmeans:K with K from 2"),
        ("k-means:64", "write kmeans:K with K from 2"),
        ("kmeans:64", 'the images of split "train" have only 24 regions: choose fewer clusters'),
        (".", "neither a store nor a trained model is there"),
    ],
)
def test_labels_that_cannot_be_made_are_one_line(given: str, expected: str, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "store")
    with pytest.raises(UserError, match="--extractor") as refused:
        update_image_labels(tmp_path / "store", given)
    assert expected in str(refused.value)
    assert contents(tmp_path / "store").keys() - {"verified.json"} == contents(plain).keys() - {"verified.json"}


def test_more_clusters_than_regions_in_an_unfinished_store_say_what_to_do(tmp_path: Path) -> None:
    """The unfinished store refuses another number of clusters."""
    write_synthetic_store(tmp_path / "store", 10, regions=(2, 2), image_num_classes=0)
    shards = FeatureStore(tmp_path / "store").description.shards
    unfinished: Any = SimpleNamespace(path=tmp_path / "store", shard_file=lambda index: tmp_path / "store" / shards[index].file)
    with pytest.raises(UserError, match=r'split "train" have only 16 regions: choose fewer clusters, and remove .*store or name'):
        label_shards(unfinished, len(shards), "kmeans:17", {"name": "random"}, ("train", "valid"))


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


def test_clusters_of_other_features_are_refused(manifest: Path, plain: Path, labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its region labels are not by k-means"):
        make(manifest, tmp_path / "b", SETTINGS.model_copy(update={"image_labels": str(plain)}))
    settings = SETTINGS.model_copy(update={"image_labels": str(labelled), "extractor_options": {"image": {"side": 3}}})
    with pytest.raises(UserError, match=r"are of features of another image extractor \(side is 2, here 3\)"):
        make(manifest, tmp_path / "c", settings)
    first = tmp_path / "first"
    shutil.copytree(labelled, first)
    (file,) = first.glob("image_clusters-*")
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="damaged"):
        make(manifest, tmp_path / "d", SETTINGS.model_copy(update={"image_labels": str(first)}))
    assert any("damaged" in failure for failure in inspect_store(first).failures)
    with pytest.raises(UserError, match="damaged"):
        open_store(first)


def test_an_update_of_the_images_keeps_the_clusters_of_the_same_extractor(
    manifest: Path, labelled: Path, tmp_path: Path
) -> None:
    store, before, files = tmp_path / "store", labels_by_id(labelled), tmp_path / "files"
    shutil.copytree(labelled, store)
    shutil.copytree(manifest.parent, files)
    shutil.copy(files / "0.png", files / "1.png")
    arguments = ["update", store, "--modality", "image", "--manifest", files / "manifest.jsonl", "--workers", 1]
    assert command(*arguments, "--extractor", UNLABELLED) == 0
    assert labels_by_id(store) == {**before, "s1": before["s0"]}
    assert inspect_store(store).failures == []
    with logged_lines() as logged:
        assert command(*arguments, "--extractor", COLOURS) == 0
    assert any("the labels by k-means were removed" in line for line in logged)
    assert IMAGE_LABELS not in load_description(store).extractors and not list(store.glob("image_clusters-*"))
    assert {label for labels in labels_by_id(store).values() for label in labels} == {0}


def test_a_finished_store_is_labelled_by_update(plain: Path, labelled: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(plain, store)
    assert command("update", store, "--modality", "image_labels", "--extractor", "kmeans:2") == 0
    assert labels_by_id(store) == labels_by_id(labelled)
    assert clusters_of(store).fingerprint() == clusters_of(labelled).fingerprint()
    assert inspect_store(store).failures == []
    assert command("update", store, "--modality", "image_labels", "--extractor", "kmeans:3") == 0
    assert load_description(store).dims.image_num_classes == 3 and len(list(store.glob("image_clusters-*"))) == 1
    next(store.glob("image_clusters-*")).unlink()
    assert command("update", store, "--modality", "image_labels", "--extractor", labelled) == 0, "the remedy of a missing file"
    assert labels_by_id(store) == labels_by_id(labelled)


def test_a_model_labels_raw_images_with_the_clusters_of_its_store(manifest: Path, labelled: Path, tmp_path: Path) -> None:
    copy_processor_files(FeatureStore(labelled), tmp_path / "processor")
    config, *_ = settle("opt-tiny", [], [str(labelled)])
    processor = OPTProcessor(tmp_path / "processor", config.model)
    for number in (0, 1):
        sample = processor(image=manifest.parent / f"{number}.png")
        assert sample.items[1].labels.tolist() == labels_by_id(labelled)[f"s{number}"]
    processor.close()


def test_stores_without_these_labels_keep_their_key_and_their_files(plain: Path) -> None:
    assert "image_labels" not in SETTINGS.hashed()
    assert not list(plain.glob("image_clusters-*")) and IMAGE_LABELS not in load_description(plain).extractors
