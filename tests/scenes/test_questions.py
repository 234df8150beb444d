"""Test questions: the answers are right, yes and no are even, and the VQA importer reads the files."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opt_ds.ingest.importers.vqa import import_vqa
from opt_ds.ingest.manifest import read_manifest
from opt_ds.scenes.phrases import RELATIONS
from opt_ds.scenes.questions import Question, question_kind, scene_questions, vqa_files
from opt_ds.scenes.random_choices import Choices
from opt_ds.scenes.truth import SIDES_OF_AXIS, Group, SceneGraph
from opt_ds.scenes.vocabulary import COLOUR_WORDS, KINDS

Asked = list[tuple[SceneGraph, Question]]


@pytest.fixture(scope="module")
def asked(described: list[Any]) -> Asked:
    graphs = [each.scene.graph for each in described]
    return [(graph, question) for n, graph in enumerate(graphs) for question in scene_questions(graph, Choices("q", n))]


def test_kinds_are_recognised_and_none_is_rare(asked: Asked) -> None:
    counts = Counter(question.kind for _, question in asked)
    assert [question.text for _, question in asked if question_kind(question.text) != question.kind] == []
    assert len(counts) == 6 and min(counts.values()) > 1000
    assert question_kind("a red cat") is None


def test_yes_and_no_are_even(asked: Asked) -> None:
    for kind in ("is there", "where yes/no"):
        answers = Counter(question.answer for _, question in asked if question.kind == kind)
        assert set(answers) == {"yes", "no"} and 0.45 < answers["yes"] / answers.total() < 0.55


def test_answers_are_right(asked: Asked) -> None:
    """Answered again from the words of the question and the scene alone."""
    wrong = [(question, graph) for graph, question in asked if _answer(question.text, graph) != question.answer]
    assert wrong == []


def test_the_importer_reads_the_files(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    by_image: dict[int, list[Question]] = {}
    for number, (_, question) in enumerate(asked[:60]):
        by_image.setdefault(number // 6, []).append(question)
    for image in by_image:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{image:012d}.png")
    questions, annotations = vqa_files(list(by_image.items()), "valid")
    (tmp_path / "q.json").write_text(json.dumps(questions))
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    output = import_vqa(
        [f"valid={tmp_path / 'q.json'}"], [str(tmp_path / "a.json")], tmp_path / "m.jsonl", images=tmp_path / "images",
        min_count=1,
    )  # fmt: skip
    lines = read_manifest(output).lines
    assert [line.text for line in lines] == [question.text for _, question in asked[:60]]
    assert [line.labels for line in lines] == [(question.answer,) * 10 for _, question in asked[:60]]
    assert {line.split for line in lines} == {"valid"}
    assert lines[7].image == "images/000000000001.png" and lines[7].group == "image 1"


def _answer(text: str, graph: SceneGraph) -> str | None:
    """Answer a question by looking for its words."""
    words = f" {text} "
    named = [(group, place) for place, group in enumerate(graph.groups)]
    if text.startswith("how many"):
        return str(next(group.count for group, _ in named if _has(words, group.kind)))
    if text.startswith("what colour"):
        if " background " in words or " ground " in words:
            return graph.ground
        return next(group.colour for group, _ in named if _has(words, group.kind))
    if text.startswith("where"):
        place = next(place for group, place in named if _has(words, group.kind))
        return {"left": "left", "right": "right", "above": "top", "below": "bottom"}[SIDES_OF_AXIS[graph.axis][place]]
    if text.startswith("what is"):
        other = next(place for group, place in named if _has(words, group.kind))
        assert SIDES_OF_AXIS[graph.axis][1 - other] == _side(words)
        return graph.groups[1 - other].kind
    if text.startswith(("is the ", "are the ")):
        side = _side(words)
        first = next(part for part in words.split(f" {_relation(words)} "))
        placed = [place for group, place in named if _has(f" {first} ", group.kind)]
        return "yes" if SIDES_OF_AXIS[graph.axis][placed[0]] == side else "no"
    return "yes" if any(_is_said(words, group) for group in graph.groups) else "no"


def _has(words: str, kind: str) -> bool:
    return any(f" {form} " in words for form in (*KINDS[kind].words, *KINDS[kind].plurals))


def _is_said(words: str, group: Group) -> bool:
    colours = [name for name, forms in COLOUR_WORDS.items() if any(f" {form} " in words for form in forms)]
    return _has(words, group.kind) and colours in ([], [group.colour])


def _relation(words: str) -> str:
    return max((phrase for phrases in RELATIONS.values() for phrase in phrases if f" {phrase} " in words), key=len)


def _side(words: str) -> str:
    return next(side for side, phrases in RELATIONS.items() if _relation(words) in phrases)
