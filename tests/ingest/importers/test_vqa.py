"""VQA v2's published JSON -> questions with their annotators' answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opt_ds.errors import UserError
from opt_ds.ingest.importers.vqa import answer_vocabulary, import_vqa, normalized_answer
from opt_ds.ingest.manifest import read_manifest


def write(folder: Path, questions: list[dict[str, Any]], answers: dict[int, list[str]], subtype: str = "train2014") -> list[str]:
    (folder / "q.json").write_text(json.dumps({"data_subtype": subtype, "questions": questions}))
    notes = [{"question_id": i, "answers": [{"answer": a} for a in given]} for i, given in answers.items()]
    (folder / "a.json").write_text(json.dumps({"data_subtype": subtype, "annotations": notes}))
    return [str(folder / "q.json"), str(folder / "a.json")]


def question(number: int, image: int = 9) -> dict[str, Any]:
    return {"question_id": number, "image_id": image, "question": f"how many, number {number}?"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "train2014"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "COCO_train2014_000000000009.jpg")
    return tmp_path / "images"


def test_answers_are_labels_as_often_as_given_and_rare_ones_are_none(tmp_path: Path, images: Path) -> None:
    answers = {1: ["Two"] * 7 + ["2", "a few", "many"], 2: ["2"] * 6 + ["3"] * 4, 3: ["blue"] * 10}
    paths = write(tmp_path, [question(n) for n in (1, 2, 3)], answers)
    output = import_vqa(paths[:1], paths[1:], tmp_path / "manifest.jsonl", images=images, min_count=2)
    lines = {line.id: line for line in read_manifest(output).lines}
    assert lines["question 1"].labels == ("2",) * 8 and lines["question 2"].labels == ("2",) * 6
    assert "question 3" not in lines, "its one answer is the most frequent one of a single question"
    first = lines["question 1"]
    assert first.text == "how many, number 1?" and first.group == "image 9" and first.split == "train"
    assert first.image == "images/train2014/COCO_train2014_000000000009.jpg"
    report = json.loads((tmp_path / "manifest.report.json").read_text())
    assert report["reasons"] == {"none of its answers is frequent enough to be a label": 1}


def test_a_missing_image_leaves_the_question_out_and_the_split_can_be_named(tmp_path: Path, images: Path) -> None:
    q, a = write(tmp_path, [question(1), question(2, image=10)], {1: ["yes"] * 10, 2: ["yes"] * 10})
    output = import_vqa([f"test={q}"], [a], tmp_path / "m.jsonl", images=images, min_count=1)
    (line,) = read_manifest(output).lines
    assert line.split == "test" and line.id == "question 1"


def test_what_has_no_frequent_answer_is_left_out_of_training_only(tmp_path: Path, images: Path) -> None:
    files: tuple[list[str], list[str]] = ([], [])
    for split, folder, first in (("train", tmp_path / "a", 0), ("train", tmp_path / "b", 10), ("valid", tmp_path / "c", 20)):
        folder.mkdir()
        answers = {first + 1: ["yes"] * 10, first + 2: ["yes"] * 10, first + 3: ["blue"] * 10}
        for given, path in zip(files, write(folder, [question(first + n) for n in (1, 2, 3, 4)], answers), strict=True):
            given.append(f"{split}={path}")
    output = import_vqa(*files, tmp_path / "m.jsonl", images=images, min_count=2)
    found = {line.id: line.labels for line in read_manifest(output).lines}
    assert found["question 23"] == () and not {"question 3", "question 13"} & set(found)
    assert "question 24" not in found, "without annotations nobody knows whether an answer is right"


@pytest.mark.parametrize(
    ("published", "normal"),
    [("A dog.", "dog"), ("the Red-Blue car", "red blue car"), ("ten", "10"), ("2.5", "2.5"), ("1,000", "1000"), ("yes!", "yes"),
     ("none", "0"), ("don't know", "don't know")],
)  # fmt: skip
def test_answers_are_normalised_as_the_evaluation_does(published: str, normal: str) -> None:
    assert normalized_answer(published) == normal


def test_the_vocabulary_counts_questions_by_their_most_frequent_answer() -> None:
    given = [["yes"] * 6 + ["no"] * 4] * 3 + [["no"] * 10]
    assert answer_vocabulary(given, 2) == {"yes"}


def test_what_is_not_vqas_is_refused_in_one_line(tmp_path: Path, images: Path) -> None:
    q, a = write(tmp_path, [question(1)], {1: ["yes"] * 10})
    with pytest.raises(UserError, match='no "annotations" with answers'):
        import_vqa([q], [q], tmp_path / "m.jsonl", images=images)
    with pytest.raises(UserError, match="no answer is the most frequent one of 9 questions: lower --min-count"):
        import_vqa([q], [a], tmp_path / "m.jsonl", images=images)
    with pytest.raises(UserError, match="give each its own"):
        import_vqa([q, q], [a], tmp_path / "m.jsonl", images=images)


def test_questions_of_a_test_set_are_all_kept_without_answers(tmp_path: Path, images: Path) -> None:
    (tmp_path / "test").mkdir()
    q, a = write(tmp_path, [question(n) for n in (1, 2, 3)], {1: ["yes"] * 10, 2: ["yes"] * 10, 3: ["blue"] * 10})
    (images / "test2015").mkdir()
    Image.new("RGB", (8, 8)).save(images / "test2015" / "COCO_test2015_000000000007.jpg")
    test, _ = write(tmp_path / "test", [question(7, image=7), question(8, image=7)], {}, subtype="test-dev2015")
    output = import_vqa([f"train={q}"], [f"train={a}"], tmp_path / "m.jsonl", images=images, min_count=2, unanswered=[test])
    lines = {line.id: line for line in read_manifest(output).lines}
    assert set(lines) == {"question 1", "question 2", "question 7", "question 8"}
    assert {(lines[f"question {n}"].split, lines[f"question {n}"].labels) for n in (7, 8)} == {("test", ())}
    assert lines["question 7"].image == "images/test2015/COCO_test2015_000000000007.jpg"
    alone = import_vqa([], [], tmp_path / "alone.jsonl", images=images, unanswered=[f"mine={test}"])
    assert {line.split for line in read_manifest(alone).lines} == {"mine"}
    with pytest.raises(UserError, match="no questions: give --questions with --annotations, or --unanswered"):
        import_vqa([], [], tmp_path / "none.jsonl", images=images)
