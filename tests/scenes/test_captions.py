"""Test captions and their parser: every caption is read exactly, however it is worded; other texts are not."""

from collections import Counter
from typing import Any

import pytest

from opt_ds.scenes.captions import Phrasing, Wording, caption
from opt_ds.scenes.parser import noun_phrases, parse_caption
from opt_ds.scenes.truth import SIDES_OF_AXIS, Group, SceneGraph
from opt_ds.scenes.vocabulary import COLOUR_WORDS, GROUND_WORDS, KINDS, SIZE_WORDS

RED_CAT, BLUE_DOGS = Group("cat", 1, "red", "small"), Group("dog", 2, "blue")
SIDE_BY_SIDE = SceneGraph((RED_CAT, BLUE_DOGS), "horizontal", "green")


def test_every_caption_and_paraphrase_is_read_exactly(described: list[Any]) -> None:
    captions = [(text, mentioned) for each in described for text, mentioned, _ in each.captions]
    assert len(captions) > 5000
    assert [text for text, mentioned in captions if parse_caption(text) != mentioned] == []
    assert all(len({text for text, _, _ in each.captions}) == 3 for each in described)


def test_every_negative_is_read_exactly(described: list[Any]) -> None:
    negatives = [pair for each in described for pair in each.negatives.values()]
    assert [text for graph, text in negatives if parse_caption(text) != graph] == []


def test_captions_use_every_word_and_template(described: list[Any]) -> None:
    texts = [text for each in described for text, _, _ in each.captions]
    words = Counter(word for text in texts for word in text.split())
    known = [*COLOUR_WORDS.values(), *GROUND_WORDS.values(), *SIZE_WORDS.values()]
    known += [kind.words for kind in KINDS.values()] + [kind.plurals for kind in KINDS.values()]
    assert [word for options in known for word in options if words[word] == 0] == []
    templates = Counter(phrasing.template for each in described for _, _, phrasing in each.captions)
    assert len(templates) == 5 and min(templates.values()) > 100
    assert len(texts) == len(described) * 3 and len(set(texts)) > 0.95 * len(texts)


def test_most_captions_are_in_reading_order(described: list[Any]) -> None:
    """The first group named is the left or upper one, as the nouns in the text show."""
    first = [
        noun_phrases(text)[0] == mentioned.groups[0]
        for each in described
        for text, mentioned, _ in each.captions
        if mentioned.axis is not None
    ]
    assert 0.85 < sum(first) / len(first) < 0.9


@pytest.mark.parametrize(
    "text",
    [
        "a small red cat left of two blue dogs on a green background",
        "A little red cat to the left of a pair of blue dogs, on green.",
        "two blue dogs on the right side of one tiny red cat on a green ground",
        "on the left a small red cat and on the right two blue dogs against a green background",
        "a picture of two blue dogs on the right and a small red cat on the left in front of a green background",
        "on a green background a small red cat with two blue dogs to the right",
        "a couple of blue dogs with a small red cat on the left with a green background",
        "there is a small red cat left of two blue dogs on green",
        "a small red cat is left of two blue dogs on green",
    ],
)
def test_paraphrases_have_one_graph(text: str) -> None:
    assert parse_caption(text) == SIDE_BY_SIDE


@pytest.mark.parametrize(
    ("text", "groups", "axis"),
    [
        ("a bunny above an automobile", ("rabbit", "car"), "vertical"),
        ("an automobile beneath a bunny", ("rabbit", "car"), "vertical"),
        ("a bike with a plane overhead", ("airplane", "bicycle"), "vertical"),
        ("at the bottom a gift and at the top a boat", ("sailboat", "present"), "vertical"),
        ("a hog right of a tortoise", ("turtle", "pig"), "horizontal"),
    ],
)
def test_synonyms_and_reverse_orders_are_read(text: str, groups: tuple[str, str], axis: str) -> None:
    graph = parse_caption(text)
    assert graph is not None and graph.axis == axis
    assert tuple(group.kind for group in graph.groups) == groups


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "cat",
        "two cat",
        "a cats",
        "a cat left of",
        "a cat left of a dog left of a pig",
        "a cat left of left of a dog",
        "a cat left of a bunny rabbit",
        "a cat left of another cat a cat",
        "a cat left of a cat",
        "a red blue cat",
        "a cat on orange",
        "a cat on a red background",
        "on a green background a cat on a blue background",
        "a cat on the left and a dog on the left",
        "a cat on the left and a dog at the bottom",
        "four cats",
        "a unicorn",
        "a cat left of a dog on a green",
    ],
)
def test_other_texts_have_no_graph(text: str) -> None:
    assert parse_caption(text) is None


def test_parts_of_other_texts_are_found() -> None:
    assert noun_phrases("well, two red cats and a dog and three bus") == (Group("cat", 2, "red"), Group("dog"))
    assert noun_phrases("nothing here") == ()


def test_articles_and_verbs_fit() -> None:
    graph = SceneGraph((Group("elephant", 1, "orange"), Group("apple", 3)), None, None)
    assert caption(SceneGraph(graph.groups[:1]), Phrasing()) == "an orange elephant"
    assert caption(SceneGraph(graph.groups[1:]), Phrasing(frame="there")) == "there are three apples"
    assert caption(SceneGraph(graph.groups[:1]), Phrasing(frame="here")) == "here is an orange elephant"
    assert caption(SceneGraph((Group("apple"),)), Phrasing(wordings=(Wording(count=1),))) == "one apple"


def test_the_sides_of_an_axis_are_opposite() -> None:
    for axis, (first, second) in SIDES_OF_AXIS.items():
        for reverse in (False, True):
            graph = SceneGraph((Group("cat"), Group("dog")), axis, None)
            text = caption(graph, Phrasing(reverse=reverse))
            assert text.split()[1] == ("dog" if reverse else "cat")
            assert (second if reverse else first) in text
            assert parse_caption(text) == graph
