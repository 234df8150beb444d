"""Test probes for binding labels: an encoder that binds is cleared, one that knows the concepts alone is exposed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_ds.data.modalities import IMAGE
from opt_ds.data.sample import Sample
from opt_ds.evaluation import scene_probes
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.figures import FIGURES
from opt_ds.evaluation.reading import read_scenes
from opt_ds.evaluation.scene_truth import SampleCounts, SceneTruth
from opt_ds.scenes.labels import LABEL_KINDS, concepts, labels_with_kinds, scene_labels
from opt_ds.scenes.records import SceneRecord, read_truth, truth_lines
from opt_ds.scenes.sampling import COMPOSITION, TRAIN
from opt_ds.store import FeatureStore
from tests.evaluation.scene_store import make_records, open_model, write_store
from tests.tiny import masked

WITHOUT = {name: {"weight": 0} for name in ("dtr", "dir", "matching")}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The truth file, with the store next to it."""
    folder, records = tmp_path_factory.mktemp("probes"), make_records({TRAIN: 400, COMPOSITION: 28})
    (folder / "truth.jsonl").write_text("".join(truth_lines(records)))
    write_store(folder / "store", records, drawn=False, coded=False)
    return folder / "truth.jsonl"


@pytest.fixture
def encoder(truth: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluator:
    monkeypatch.setattr(scene_probes, "_FEWEST_POSITIVES", 3)
    return open_model(FeatureStore(truth.with_name("store")), **WITHOUT)


def knows(monkeypatch: pytest.MonkeyPatch, encoder: Evaluator, truth: Path, names_of: Callable[[SceneRecord], Any]) -> None:
    """Let [CLS] of any input be the counts of some names of the scene. The untrained encoder stays as it is."""
    records = read_truth(truth)
    names = sorted({name for record in records.values() for name in names_of(record)})

    def vectors(samples: list[Sample]) -> np.ndarray:
        own = [list(names_of(records[sample.name.rpartition("/")[2]])) for sample in samples]
        return np.array([[given.count(name) for name in names] for given in own], dtype=np.float32)

    monkeypatch.setattr(encoder, "cls_vectors", vectors)


def probes(encoder: Evaluator, truth: Path) -> dict[str, Any]:
    figures = SceneTruth(encoder, truth, lambda: pytest.fail("no images")).measure(COMPOSITION, SampleCounts(generate=0))
    assert set(figures["skipped"]) == {"texts", "negatives, likelihood", "negatives, matching"}
    return figures


def verdicts(figures: dict[str, Any], name: str, kind: str) -> list[str]:
    return figures["probes"][name][FIGURES][kind]["verdicts"]


def test_an_encoder_that_binds_is_cleared(encoder: Evaluator, truth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knows(monkeypatch, encoder, truth, lambda record: scene_labels(record.scene.graph))
    figures = probes(encoder, truth)
    for name in ("T", "I", "A"):
        row = figures["probes"][name]
        for kind in LABEL_KINDS:
            assert row[kind] == 1 and set(row[FIGURES][kind]["controls"]) == {"chance", "untrained_probe", "concepts_probe"}
            control = {key: found["value"] for key, found in row[FIGURES][kind]["controls"].items()}
            assert control["untrained_probe"] < 0.6 and control["chance"] < 0.5
            if kind in ("place", "relation"):  # concepts tell most colours of so few samples
                assert control["concepts_probe"] < 0.9
        assert verdicts(figures, name, "place") == []
        assert verdicts(figures, name, "object") == ["no better than true concepts without binding, probe"]
    assert set(figures["probes"]["labels"]) == set(LABEL_KINDS) and figures["probes"]["samples"] == 28
    (table,) = read_scenes(figures)
    assert table[1] == ("mAP",) and len(table[2]) == 12 and all(shown["mAP"].controls for _, shown in table[2])


def test_an_encoder_that_knows_the_concepts_alone_is_exposed(
    encoder: Evaluator, truth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knows(monkeypatch, encoder, truth, lambda record: concepts(record.scene.graph).elements())
    figures = probes(encoder, truth)
    for kind in LABEL_KINDS:
        assert "no better than true concepts without binding, probe" in verdicts(figures, "I", kind)
    assert figures["probes"]["I"]["place"] < 0.9


def test_an_untrained_encoder_is_no_better_than_itself(encoder: Evaluator, truth: Path) -> None:
    from opt_ds.evaluation.controls import untrained

    figures = probes(untrained(encoder), truth)
    for kind in LABEL_KINDS:
        row = figures["probes"]["I"]
        assert row[kind] == row[FIGURES][kind]["controls"]["untrained_probe"]["value"]
        assert "no better than untrained encoder, probe" in verdicts(figures, "I", kind)


def test_swapped_groups_and_exchanged_colours_have_the_same_concepts_and_other_labels() -> None:
    graphs = [record.scene.graph for record in make_records() if len(record.scene.graph.groups) == 2]
    assert graphs
    for graph in graphs:
        swapped = replace(graph, groups=graph.groups[::-1])
        assert concepts(swapped) == concepts(graph) and set(scene_labels(swapped)) != set(scene_labels(graph))
        one, other = graph.groups
        if one.colour != other.colour:
            exchanged = replace(graph, groups=(replace(one, colour=other.colour), replace(other, colour=one.colour)))
            assert concepts(exchanged) == concepts(graph) and set(scene_labels(exchanged)) != set(scene_labels(graph))
        assert {kind for kind, _ in labels_with_kinds(graph)} >= {"object", "place", "relation"}


def test_samples_that_the_truth_does_not_know_are_not_fitted_on(
    encoder: Evaluator, truth: Path, tmp_path: Path
) -> None:
    lines = truth.read_text().splitlines(keepends=True)
    part = tmp_path / "truth.jsonl"
    part.write_text("".join(lines[300:]))  # the training samples come first
    assert probes(encoder, part)["probes"]["train_samples"] == 100
    part.write_text("".join(lines[400:]))
    with pytest.raises(Exception, match="probes: no label has 10 samples"):
        SceneTruth(encoder, part, lambda: pytest.fail("no images")).measure(COMPOSITION, SampleCounts(generate=0))


def test_inputs_that_a_store_lacks_are_not_probed(encoder: Evaluator, truth: Path) -> None:
    figures = probes(Evaluator(encoder.model, encoder.config, masked(encoder.store, IMAGE)), truth)
    assert [name for name in ("T", "I", "A") if name in figures["probes"]] == ["T", "A"]
