"""Questions about a scene, with answers, in the format of VQA v2's files.

| kind | answer |
|---|---|
| is there | yes or no: a group as said, or one with another kind or colour |
| where yes/no | yes or no: the relation of two groups, or the swapped one |
| what colour | a tint, or the colour of the ground |
| how many | 1, 2 or 3 |
| what is | the kind that stands left of, right of, above or below another |
| where | left, right, top or bottom |

As many answers to yes/no questions are yes as no.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from opt_ds.scenes.captions import Phrasing, Wording, noun_phrase
from opt_ds.scenes.negatives import hard_negatives
from opt_ds.scenes.phrases import RELATIONS
from opt_ds.scenes.random_choices import Choices
from opt_ds.scenes.truth import SIDES_OF_AXIS, Group, SceneGraph
from opt_ds.scenes.vocabulary import KINDS

#: Number of annotators of a question in VQA v2. Here they agree.
ANNOTATORS = 10
_ANSWER_OF_SIDE = {"left": "left", "right": "right", "above": "top", "below": "bottom"}


@dataclass(frozen=True)
class Question:
    """A question, its answer, and its kind (the table in this module's description)."""

    kind: str
    text: str
    answer: str


def scene_questions(graph: SceneGraph, choices: Choices) -> list[Question]:
    """Return one question of each kind that the scene allows."""
    questions = [_is_there(graph, choices), _what_colour(graph, choices), _how_many(graph, choices)]
    if graph.axis is not None:
        questions += [_is_placed(graph, choices), _what_is(graph, choices), _where(graph, choices)]
    return questions


def question_kind(text: str) -> str | None:
    """Return the kind of a question of this corpus, for figures per kind; None for any other text."""
    words = text.lower()
    starts = {
        "what colour": "what colour",
        "how many": "how many",
        "what is": "what is",
        "where": "where",
        "is there": "is there",
        "are there": "is there",
        "is the": "where yes/no",
        "are the": "where yes/no",
    }
    return next((kind for start, kind in starts.items() if words.startswith(start)), None)


def vqa_files(questions: list[tuple[int, list[Question]]], subtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the question file and the annotation file of a split, as VQA v2 has them.

    Args:
        questions: Number of the image, which is the name of its file, and its questions.
        subtype: Name of the split.
    """
    asked, annotations = [], []
    for image_id, of_image in questions:
        for place, question in enumerate(of_image):
            names = {"question_id": image_id * 10 + place, "image_id": image_id}
            answers = [
                {"answer_id": number, "answer": question.answer, "answer_confidence": "yes"}
                for number in range(1, ANNOTATORS + 1)
            ]
            asked.append({**names, "question": question.text})
            annotations.append({
                **names, "question_type": question.kind, "answer_type": _answer_type(question.answer),
                "multiple_choice_answer": question.answer, "answers": answers,
            })  # fmt: skip
    shared = {"data_type": "scenes", "data_subtype": subtype}
    return {"task_type": "Open-Ended", **shared, "questions": asked}, {**shared, "annotations": annotations}


def _answer_type(answer: str) -> str:
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def _is_there(graph: SceneGraph, choices: Choices) -> Question:
    group, answer = choices.one_of(graph.groups), "yes"
    changed = list(_negatives(graph, ("object", "colour"), choices))  # none for a few scenes of test_composition
    if changed and choices.chance(0.5):
        group, answer = next(each for each in choices.one_of(changed).groups if each not in graph.groups), "no"
    verb = "is" if group.count == 1 else "are"
    return Question("is there", f"{verb} there {_nouns(group, choices)}", answer)


def _is_placed(graph: SceneGraph, choices: Choices) -> Question:
    said, answer = graph, "yes"
    if choices.chance(0.5):
        said, answer = choices.one_of(list(_negatives(graph, ("swapped", "relation"), choices))), "no"
    assert said.axis is not None
    first = choices.below(2)
    side = SIDES_OF_AXIS[said.axis][first]
    one, other = said.groups[first], said.groups[1 - first]
    verb = "is" if one.count == 1 else "are"
    return Question("where yes/no", f"{verb} {_the(one)} {_relation(side, choices)} {_the(other)}", answer)


def _negatives(graph: SceneGraph, kinds: tuple[str, ...], choices: Choices) -> Iterator[SceneGraph]:
    found = hard_negatives(graph, graph, Phrasing(), choices)
    yield from (said for kind, (said, _) in found.items() if kind in kinds)


def _what_colour(graph: SceneGraph, choices: Choices) -> Question:
    tinted = [group for group in graph.groups if group.colour is not None]
    if not tinted or choices.chance(0.25):
        assert graph.ground is not None
        return Question("what colour", f"what colour is the {choices.one_of(('background', 'ground'))}", graph.ground)
    group = choices.one_of(tinted)
    verb = "is" if group.count == 1 else "are"
    return Question("what colour", f"what colour {verb} {_the(replace(group, colour=None))}", str(group.colour))


def _how_many(graph: SceneGraph, choices: Choices) -> Question:
    group = choices.one_of(graph.groups)
    plural = choices.one_of(KINDS[group.kind].plurals)
    return Question("how many", f"how many {plural} are there", str(group.count))


def _what_is(graph: SceneGraph, choices: Choices) -> Question:
    assert graph.axis is not None
    asked = choices.below(2)
    side = SIDES_OF_AXIS[graph.axis][asked]
    other = replace(graph.groups[1 - asked], colour=None)
    return Question("what is", f"what is {_relation(side, choices)} {_the(other)}", graph.groups[asked].kind)


def _where(graph: SceneGraph, choices: Choices) -> Question:
    assert graph.axis is not None
    asked = choices.below(2)
    group = graph.groups[asked]
    verb = "is" if group.count == 1 else "are"
    answer = _ANSWER_OF_SIDE[SIDES_OF_AXIS[graph.axis][asked]]
    return Question("where", f"where {verb} {_the(replace(group, colour=None))}", answer)


def _relation(side: str, choices: Choices) -> str:
    return choices.one_of(RELATIONS[side])


def _nouns(group: Group, choices: Choices) -> str:
    wording = Wording(kind=choices.below(2), size=choices.below(3), colour=choices.below(2))
    return noun_phrase(group, wording)


def _the(group: Group) -> str:
    """Return a group as it is asked about: its kind and colour."""
    kind = KINDS[group.kind]
    noun = kind.name if group.count == 1 else kind.plurals[0]
    return f"the {group.colour} {noun}" if group.colour else f"the {noun}"
