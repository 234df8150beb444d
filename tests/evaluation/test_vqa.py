"""VQA's published accuracy, and a head that answers."""

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.experiments import Request
from opt_ds.evaluation.experiments.vqa import EXPERIMENT
from opt_ds.evaluation.vqa import ANNOTATORS, answer_accuracy, vqa
from opt_ds.serving.report_tables import vqa_table
from opt_ds.store import FeatureStore
from tests.tiny import make_config, make_model, make_store, masked


@pytest.mark.parametrize("times", range(ANNOTATORS + 1))
def test_accuracy_is_the_mean_over_all_choices_of_nine_annotators(times: int) -> None:
    answers = ["yes"] * times + ["no"] * (ANNOTATORS - times)
    expected = np.mean([min(nine.count("yes") / 3, 1) for nine in combinations(answers, ANNOTATORS - 1)])
    assert answer_accuracy(Counter(answers), "yes") == pytest.approx(expected)


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluator:
    """A model with three answers. Per question, four annotators gave `yes`, one `2`, and five an answer that is no label."""
    store = make_store(tmp_path / "store", 30)
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: ["yes"] * 4 + ["2"])
    config = make_config(tasks={"labels": {"names": ["2", "no", "yes"], "answers": True}})
    return Evaluator(make_model(config), config, store)


def test_the_answer_that_scores_most_is_given(answering: Evaluator) -> None:
    head = answering.model.labels
    assert head is not None
    for answer, expected in (("yes", 1.0), ("2", 0.3), ("no", 0.0)):
        with torch.no_grad():
            head.score.bias.copy_(torch.tensor([1e3 * (name == answer) for name in ("2", "no", "yes")]))
        figures = vqa(answering, "valid")
        assert figures["accuracy"] == pytest.approx(expected)
        assert figures["constant_answer"] == {"answer": "yes", "accuracy": pytest.approx(1.0)}
        assert figures["best_possible"] == pytest.approx(1.0) and figures["questions"] == 6


def test_questions_without_a_frequent_answer_count_as_wrong(answering: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    hard = set(answering.store.split_samples("valid")[:3].tolist())
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: [] if index in hard else ["yes"] * 10)
    figures = vqa(answering, "valid")
    assert figures["questions"] == 6
    assert figures["best_possible"] == figures["constant_answer"]["accuracy"] == pytest.approx(0.5)
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: [])
    with pytest.raises(UserError, match='no sample of split "valid" has T\\+I and answers'):
        vqa(answering, "valid")


def test_a_model_without_the_head_is_refused(evaluator: Evaluator) -> None:
    with pytest.raises(UserError, match="no head for answers: opt-ds finetune vqa trains one"):
        vqa(evaluator, "valid")
    with pytest.raises(UserError, match="no label head"):
        evaluator.label_scores([])


@pytest.mark.parametrize("given", [["yes"], ["yes"] * 2, ["yes"] * 3, ["yes"] * 4, ["yes"] * 5, ["yes"] * 10])
def test_the_answer_that_all_annotators_gave_is_right(
    answering: Evaluator, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: given)
    head = answering.model.labels
    assert head is not None
    for answer, expected in (("yes", 1.0), ("no", 0.0)):
        with torch.no_grad():
            head.score.bias.copy_(torch.tensor([1e3 * (name == answer) for name in ("2", "no", "yes")]))
        figures = vqa(answering, "valid")
        assert figures["accuracy"] == pytest.approx(expected)
        assert figures["best_possible"] == pytest.approx(1.0)
        assert figures["annotators"] == (len(given) if len(given) < 4 else 10)
        assert figures["measure"] == ("any annotator" if len(given) < 4 else "min(others / 3, 1)")


def test_repeated_labels_survive_in_a_store(tmp_path: Path) -> None:
    from tests.store.test_checks import content_of, image, new_writer

    content = content_of(0, image(), np.array([5]), np.ones((1, 3), "float16"))
    content.samples[0] = replace(content.samples[0], labels=["yes", "no", "yes"])
    new_writer(tmp_path / "s", ["no", "yes"]).write_shard(0, content)
    new_writer(tmp_path / "s", ["no", "yes"]).finish(1)
    assert FeatureStore(tmp_path / "s").labels(0) == ["yes", "no", "yes"]


def _request(evaluator: Evaluator, output: Path) -> Request:
    return Request(evaluator, ("valid",), output, output, 1, lambda weights: pytest.fail("nothing is rated"))


def test_a_split_without_answers_is_answered_for_the_server(
    answering: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: [])
    monkeypatch.setattr(FeatureStore, "sample_id", lambda self, index: f"question {index}")
    request = _request(answering, tmp_path / "vqa.json")
    options = {"limit": None, "untrained": None, "annotations": None, "predictions": None, "evalai": None}
    with pytest.raises(UserError, match="for a test set without answers, --evalai writes the model's answers"):
        EXPERIMENT.measure(request, **options)
    files = {"predictions": tmp_path / "rows.jsonl", "evalai": tmp_path / "answers.json"}
    found = EXPERIMENT.measure(request, **{**options, **files})
    questions = answering.samples_with("valid", (TEXT, IMAGE))
    given = json.loads(files["evalai"].read_text())
    assert [answer["question_id"] for answer in given] == questions.tolist()
    scores = answering.label_scores([answering.read(index, (TEXT, IMAGE)) for index in questions])
    assert [answer["answer"] for answer in given] == [answering.label_names[place] for place in scores.argmax(1)]
    rows = [json.loads(line) for line in files["predictions"].read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [answer["answer"] for answer in given]
    assert all(row["accuracy"] is None and row["references"] == {} for row in rows)
    assert "accuracy" not in found and found["questions"] == len(questions)
    assert EXPERIMENT.table(found) == (
        '  * not measured: the accuracy: no question of split "valid" has answers in the store'
    )
    assert vqa_table(found).blocks == []
    with pytest.raises(UserError, match="all questions of a split: leave out --limit"):
        EXPERIMENT.measure(request, **{**options, **files, "limit": 2})
    pictureless = Evaluator(answering.model, answering.config, masked(answering.store, IMAGE))
    with pytest.raises(UserError, match=rf"but {len(questions)} of {len(questions)} of split .* have no image"):
        EXPERIMENT.measure(_request(pictureless, tmp_path / "vqa.json"), **{**options, **files})


def test_a_split_with_answers_has_its_accuracy_beside_the_servers_file(
    answering: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureStore, "sample_id", lambda self, index: f"question {index}")
    found = EXPERIMENT.measure(
        _request(answering, tmp_path / "vqa.json"), limit=None, untrained=None, annotations=None, predictions=None,
        evalai=tmp_path / "answers.json",
    )  # fmt: skip
    assert found["accuracy"] == vqa(answering, "valid")["accuracy"]
    assert len(json.loads((tmp_path / "answers.json").read_text())) == found["questions"]
