"""Test VQA by kind of question: each kind is beside its own controls, and the kinds are those of files or of the text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.errors import UserError
from opt_ds.evaluation.controls import other_inputs, other_samples
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.experiments.vqa import EXPERIMENT
from opt_ds.evaluation.figures import FIGURES
from opt_ds.evaluation.question_kinds import QuestionKinds, question_kinds
from opt_ds.evaluation.vqa import vqa
from opt_ds.serving.report_tables import vqa_table
from opt_ds.store import FeatureStore
from tests.tiny import make_config, make_model, make_store

TEXTS = ("what colour is the cat", "how many cats are there", "is there a dog")
KINDS = ("what colour", "how many", "is there")
ANSWERS = ("1", "2", "blue", "no", "red", "yes")
IMAGES = 60  # each with one question of each kind, one third of them for training


def truth(index: int) -> str:
    """Return the answer to a question. Of three numbers, two are 1. Half of the dogs are there."""
    image = index // 3
    return (("red", "blue")[image % 2], "2" if image % 3 == 1 else "1", ("yes", "no")[image // 2 % 2])[index % 3]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    path = tmp_path_factory.mktemp("questions") / "store"
    make_store(path, 3 * IMAGES, splits={"train": 1 / 3, "valid": 2 / 3}, samples_per_group=3)
    config = make_config(data={"stores": [str(path)]}, tasks={"labels": {"names": list(ANSWERS), "answers": True}})
    return Evaluator(make_model(config), config, FeatureStore(path))


@pytest.fixture
def asked(plain: Evaluator, monkeypatch: pytest.MonkeyPatch) -> Evaluator:
    """Each image has three questions. The same three are asked of every image."""
    store = FeatureStore(plain.store.path)
    rows = store.index.rows.copy()
    rows[:, IMAGE] = rows[np.arange(len(rows)) // 3 * 3, IMAGE]
    store.index.__dict__["rows"] = rows
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: [truth(index)] * 10)
    monkeypatch.setattr(FeatureStore, "sample_id", lambda self, index: f"question {index}")
    monkeypatch.setattr(Evaluator, "caption", lambda self, index: TEXTS[index % 3])
    return Evaluator(plain.model, plain.config, store)


def answers(monkeypatch: pytest.MonkeyPatch, evaluator: Evaluator) -> None:
    """Let it see the colour, answer every number with 1, and know of the dog from the question's name alone."""
    image_of = {evaluator.read(index, (IMAGE,)).of(IMAGE).features.tobytes(): index // 3 for index in range(3 * IMAGES)}
    assert len(image_of) == IMAGES

    def answer(sample: Sample) -> str:
        own = int(sample.name.rpartition(" ")[2])
        return (truth(3 * image_of[sample.of(IMAGE).features.tobytes()]), "1", truth(own))[own % 3]

    def scores(samples: list[Sample]) -> np.ndarray:
        return np.eye(len(ANSWERS))[[ANSWERS.index(answer(sample)) for sample in samples]]

    monkeypatch.setattr(evaluator, "label_scores", scores)


def measured(evaluator: Evaluator, **options: Any) -> dict[str, Any]:
    kinds = question_kinds(evaluator, "valid", ())
    assert kinds is not None and kinds.source == "text"
    figures = vqa(evaluator, "valid", kinds=kinds, **options)
    json.dumps(figures, allow_nan=False)
    return figures


def test_each_kind_stands_beside_its_own_controls(asked: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, asked)
    figures = measured(asked, untrained=Evaluator(asked.model, asked.config, asked.store))
    assert set(figures["kinds"]) == set(KINDS) and figures["not_measured"] == []
    for kind, row in figures["kinds"].items():
        found = row[FIGURES]["accuracy"]
        assert set(found["controls"]) == {"constant_answer", "another_image", "untrained_finetuned"}, "a kind has one text"
        assert all(control["samples"] == row["questions"] == 40 for control in found["controls"].values()), kind
    colour, number, dog = (figures["kinds"][kind] for kind in KINDS)
    assert colour["accuracy"] == 1 and 0.2 < colour[FIGURES]["accuracy"]["controls"]["another_image"]["value"] < 0.8
    assert not colour[FIGURES]["accuracy"]["verdicts"]
    assert number["constant_answer"] == "1" and 0.6 < number["accuracy"] < 0.7
    ignored = "does not use its input (image)"
    assert number[FIGURES]["accuracy"]["verdicts"][:2] == [ignored, "no better than one answer for all"]
    assert dog["accuracy"] == 1 and ignored in dog[FIGURES]["accuracy"]["verdicts"]
    overall = figures[FIGURES]["accuracy"]["controls"]
    assert overall["constant_answer"]["value"] < overall["constant_answer_of_kind"]["value"] < figures["accuracy"]
    assert figures["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in figures["kinds"].values()]))


def test_a_figure_without_the_untrained_model_is_marked(asked: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, asked)
    figures = measured(asked)
    assert len(figures["not_measured"]) == 1 and "finetune vqa --untrained" in figures["not_measured"][0]
    text = EXPERIMENT.table(figures)
    assert "VQA, what colour, 40 questions *" in text and "* not measured: an untrained model" in text
    table = vqa_table(figures)
    assert len(table.blocks) == 4 and all(block.figures.name.endswith("*") for block in table.blocks)
    assert "* Not measured: an untrained model" in table.caption
    complete = measured(asked, untrained=Evaluator(asked.model, asked.config, asked.store))
    assert "*" not in EXPERIMENT.table(complete) and "*" not in vqa_table(complete).caption
    assert "untrained model, fine-tuned the same way" in EXPERIMENT.table(complete)


def test_the_most_frequent_answer_is_that_of_training_alone(asked: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    train = set(asked.store.split_samples("train").tolist())
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: ["2" if index in train else "1"] * 10)
    figures = measured(asked)
    assert figures["kinds"]["how many"]["constant_answer"] == figures["constant_answer"]["answer"] == "2"
    assert figures["kinds"]["how many"][FIGURES]["accuracy"]["controls"]["constant_answer"]["value"] == 0


def test_questions_that_share_texts_and_images_still_have_another_one(asked: Evaluator) -> None:
    questions = asked.store.split_samples("valid")
    assert not len(other_samples(asked, questions, (TEXT, IMAGE), 1).places), "all are related through some others"
    strata = questions % 3
    for seed in range(5):
        places, others = other_inputs(asked, questions, IMAGE, strata, seed)
        assert len(places) == len(questions) and (questions[places] // 3 != questions[others] // 3).all()
        assert (strata[places] == strata[others]).all()
    assert not len(other_inputs(asked, questions, TEXT, strata, 1).places), "a kind has one text here"
    places, others = other_inputs(asked, questions, TEXT, np.zeros(len(questions), int), 1)
    assert len(places) == len(questions) and (questions[places] % 3 != questions[others] % 3).all()


# ---- kinds from files


def annotations(path: Path, questions: np.ndarray) -> Path:
    entries = [{"question_id": int(index), "question_type": f"type {index % 3}"} for index in questions]
    path.write_text(json.dumps({"annotations": entries}))
    return path


def test_the_types_of_a_file_are_the_kinds(asked: Evaluator, tmp_path: Path) -> None:
    train, valid = (asked.store.split_samples(name) for name in ("train", "valid"))
    files = [annotations(tmp_path / "train.json", train), annotations(tmp_path / "valid.json", valid)]
    kinds = question_kinds(asked, "valid", files)
    assert kinds == QuestionKinds({int(index): f"type {index % 3}" for index in (*train, *valid)}, "annotations")
    kinds = question_kinds(asked, "valid", files[1:])
    figures = vqa(asked, "valid", kinds=kinds)
    assert any("--annotations of the training questions" in line for line in figures["not_measured"])
    assert "constant_answer_of_kind" not in figures[FIGURES]["accuracy"]["controls"]
    part = annotations(tmp_path / "part.json", valid[:30])
    figures = vqa(asked, "valid", kinds=question_kinds(asked, "valid", [files[0], part]))
    assert figures["questions_of_unknown_kind"] == 90
    assert sum(row["questions"] for row in figures["kinds"].values()) == 30
    assert "90 questions are of unknown kind" in EXPERIMENT.table(figures)


def test_files_without_types_or_of_other_questions_are_refused(asked: Evaluator, tmp_path: Path) -> None:
    train = annotations(tmp_path / "train.json", asked.store.split_samples("train"))
    with pytest.raises(UserError, match=r'train\.json: it has no question of split "valid"'):
        question_kinds(asked, "valid", [train])
    empty = tmp_path / "questions.json"
    empty.write_text(json.dumps({"questions": []}))
    with pytest.raises(UserError, match=r'questions\.json: no "annotations" with a question_id and a question_type'):
        question_kinds(asked, "valid", [empty])
    with pytest.raises(UserError, match="not readable"):
        question_kinds(asked, "valid", [tmp_path / "missing.json"])


def test_questions_of_another_corpus_have_no_kinds_of_scenes(asked: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    last = int(asked.store.split_samples("valid")[-1])
    monkeypatch.setattr(Evaluator, "caption", lambda self, index: "why" if index == last else TEXTS[index % 3])
    assert question_kinds(asked, "valid", ()) is None
    figures = vqa(asked, "valid")
    assert "kinds" not in figures and "VQA, 120 questions *" in EXPERIMENT.table(figures)
