"""Retrieval by alignment: the first stage of a model that was trained with it, beside the other scores."""

import numpy as np
import pytest
import torch

from opt_ds.config import FineTuneConfig
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.evaluation.alignment import AlignmentScores
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.projections import DIRECTIONS
from opt_ds.evaluation.retrieval import retrieval, retrieval_lines
from opt_ds.evaluation.two_stage_retrieval import TwoStages, table, two_stage_retrieval
from opt_ds.tasks.views import VIEWS
from tests.tiny import make_config, make_model, make_store

TASKS = {"sampling_weights": {"modality": 1, "matching": 1, "alignment": 1}}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    torch.set_num_threads(1)
    store = make_store(tmp_path_factory.mktemp("aligned") / "store", 60)
    config = make_config(tasks={**TASKS, "alignment": {"width": 8}}, data={"stores": [str(store.path)]})
    return Evaluator(make_model(config), config, store)


def gallery_of(evaluator: Evaluator, count: int) -> np.ndarray:
    return evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), count)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_first_stage_is_the_cosine_of_the_embeddings(aligned: Evaluator, direction: str) -> None:
    gallery = gallery_of(aligned, 7)
    queries, (query, target) = gallery[:3], DIRECTIONS[direction]
    vectors = []
    for samples, modalities in ((queries, query), (gallery, (target,))):
        view = next(name for name, of_view in VIEWS.items() if {*of_view} == {*modalities})
        cls = torch.from_numpy(aligned.cls_vectors([aligned.read(index, modalities) for index in samples]))
        projection = aligned.model.alignment.projections[view]
        projected = (cls @ projection.weight.T + projection.bias).detach().numpy()
        vectors.append(projected / np.linalg.norm(projected, axis=1, keepdims=True))
    found = TwoStages(aligned).first_stage(direction, queries, gallery)
    assert found == pytest.approx(vectors[0] @ vectors[1].T, abs=1e-5)


def test_it_is_a_row_of_each_direction_with_its_controls(aligned: Evaluator) -> None:
    found = retrieval(aligned, "train", 6, 4, 3)
    for direction in DIRECTIONS:
        row = found[direction]["alignment"]
        assert row["candidates"] == (3 if direction == "text_audio_to_image" else 6)
        assert row["chance"]["R@1"] == pytest.approx(1 / row["candidates"])
    assert any("image→text, alignment of 6" in line for line in retrieval_lines(found))


def test_two_stages_begin_with_it_and_fit_no_projection(aligned: Evaluator) -> None:
    found = two_stage_retrieval(aligned, "train", 3, 6, ["text_to_image"])
    row = found["text_to_image"]
    assert {"alignment", "matching", "likelihood", "shortlist_recall"} <= set(row) and "projection" not in row
    assert set(row["matching"]["figures"]["R@1"]["controls"]) == {"chance", "alignment", "untrained_projection"}
    assert "text→image, alignment" in table(found)
    stages = TwoStages(aligned)
    stages.figures("text_to_image", gallery_of(aligned, 6), gallery_of(aligned, 6), 3)
    assert not stages.projections._fitted


def test_other_models_keep_the_fitted_projection(aligned: Evaluator, evaluator: Evaluator) -> None:
    assert not any(AlignmentScores(evaluator).ranks(direction) for direction in DIRECTIONS), "it has no such head"
    options = FineTuneConfig(task="retrieval", checkpoint="run", weights_sha256="0", inputs=("T+I",))
    tuned = aligned.config.model_copy(update={"finetune": options})
    assert not AlignmentScores(Evaluator(aligned.model, tuned, aligned.store)).ranks("text_to_image")
    tasks = {**TASKS, "alignment": {"width": 8, "pairs": ["audio_text"]}}
    config = make_config(tasks=tasks, data=aligned.config.data.model_dump(mode="json"))
    one_pair = AlignmentScores(Evaluator(make_model(config), config, aligned.store))
    assert [direction for direction in DIRECTIONS if one_pair.ranks(direction)] == ["text_to_audio", "audio_to_text"]
