"""Test the judgement of captions: paraphrases are true, what differs is not, partial ones are incomplete."""

from typing import Any

import pytest

from opt_ds.scenes.judging import caption_is_complete, caption_is_true
from opt_ds.scenes.truth import Group, SceneGraph

TRUTH = SceneGraph((Group("cat", 1, "red", "small"), Group("banana", 2)), "horizontal", "green")


def test_all_captions_of_a_scene_are_right_and_no_negative_is(described: list[Any]) -> None:
    for each in described:
        for text, _, _ in each.captions:
            assert caption_is_true(text, each.scene.graph) and caption_is_complete(text, each.scene.graph), text
        for _, text in each.negatives.values():
            assert not caption_is_true(text, each.scene.graph), text


def test_another_scenes_caption_is_hardly_ever_true(described: list[Any]) -> None:
    graphs = [each.scene.graph for each in described]
    true = [caption_is_true(each.captions[0][0], graph) for each, graph in zip(described, graphs[7:], strict=False)]
    assert sum(true) / len(true) < 0.01


@pytest.mark.parametrize(
    ("text", "true", "complete"),
    [
        ("a tiny red cat left of two bananas", True, True),
        ("two yellow bananas to the right of a little red cat on green", True, True),  # the pictogram's own colour
        ("a red cat left of two bananas", True, False),
        ("a small cat left of two bananas", True, False),
        ("two bananas", True, False),
        ("a small red cat on a green ground", True, False),
        ("a small red cat on a blue ground", False, False),
        ("a large red cat left of two bananas", False, False),
        ("a small red cat left of a banana", False, False),
        ("a small red cat left of two green bananas", False, False),
        ("a small red cat right of two bananas", False, False),
        ("a small red cat above two bananas", False, False),
        ("two bananas left of a small red cat", False, False),
        ("a small orange cat left of two bananas", False, False),
        ("a small red cat left of two bananas and", False, False),
        ("a dog", False, False),
    ],
)
def test_a_caption_is_judged_by_what_it_says(text: str, true: bool, complete: bool) -> None:
    assert caption_is_true(text, TRUTH) == true
    assert caption_is_complete(text, TRUTH) == complete
