"""Test hard negatives: each differs in what its kind says alone, and only the truth tells it from the true caption."""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from opt_ds.scenes.holdouts import held_out
from opt_ds.scenes.negatives import NEGATIVES, difference
from opt_ds.scenes.parser import parse_caption
from opt_ds.scenes.sampling import COMPOSITION, TRAIN
from opt_ds.scenes.truth import Group, SceneGraph

CAT_DOG = SceneGraph((Group("cat", 1, "red"), Group("dog", 2, "blue")), "horizontal", "green")


def test_negatives_differ_in_what_their_kind_says(described: list[Any]) -> None:
    counts: Counter[str] = Counter()
    for each in described:
        said = parse_caption(each.captions[0][0])
        for kind, (_, text) in each.negatives.items():
            graph = parse_caption(text)
            assert said is not None and graph is not None
            assert difference(said, graph) == difference(graph, said) == kind
            counts[kind] += 1
        if said.axis is not None:
            assert {"swapped", "relation"} <= each.negatives.keys()
    assert set(counts) == set(NEGATIVES)
    assert counts["object"] > 0.95 * len(described) and counts["count"] > 0.9 * len(described)
    assert min(counts.values()) > 0.25 * len(described)


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (SceneGraph(CAT_DOG.groups[::-1], "horizontal", "green"), "swapped"),
        (CAT_DOG.with_group(0, colour="blue").with_group(1, colour="red"), "colours"),
        (CAT_DOG.with_group(0, kind="pig"), "object"),
        (CAT_DOG.with_group(1, colour="green"), "colour"),
        (CAT_DOG.with_group(1, count=1), "count"),
        (SceneGraph(CAT_DOG.groups, "vertical", "green"), "relation"),
        (CAT_DOG, None),
        (SceneGraph(CAT_DOG.groups, "horizontal", "blue"), None),
        (SceneGraph(CAT_DOG.groups[::-1], "vertical", "green"), None),
        (CAT_DOG.with_group(0, kind="pig", colour="green"), None),
        (CAT_DOG.with_group(0, size="small"), None),
        (CAT_DOG.with_group(0, colour="green").with_group(1, colour="orange"), None),
        (SceneGraph(CAT_DOG.groups[:1], None, "green"), None),
    ],
)
def test_differences_are_named(other: SceneGraph, kind: str | None) -> None:
    assert difference(CAT_DOG, other) == kind


def test_a_bag_of_words_cannot_tell_a_swapped_caption(described: list[Any]) -> None:
    swapped = [(each.captions[0][0], each.negatives["swapped"][1]) for each in described if "swapped" in each.negatives]
    assert len(swapped) > 1000
    assert [pair for pair in swapped if Counter(pair[0].split()) != Counter(pair[1].split())] == []
    assert all(true != false for true, false in swapped)


def test_what_is_held_out_stays_held_out(described: list[Any]) -> None:
    for each in described:
        said = each.captions[0][1]
        for graph, text in each.negatives.values():
            assert held_out(graph) == held_out(said), text


def test_frequencies_in_training_cannot_tell_negatives(described: list[Any]) -> None:
    """A model that knows the training captions by heart but not the image: chance, on scenes of test_composition."""
    facts = Counter(fact for each in described if each.split == TRAIN for fact in _facts(each.captions[0][0]))
    total = sum(facts.values())

    def score(text: str) -> float:
        return sum(math.log((facts[fact] + 0.5) / total) for fact in _facts(text))

    preferred: dict[str, list[float]] = {kind: [] for kind in NEGATIVES}
    for each in described:
        if each.split == COMPOSITION:
            for kind, (_, text) in each.negatives.items():
                gap = score(each.captions[0][0]) - score(text)
                preferred[kind].append(0.5 if abs(gap) < 1e-9 else float(gap > 0))
    for kind, right in preferred.items():
        assert len(right) > 25, kind
        three_errors = 3 * 0.5 / math.sqrt(len(right))
        assert abs(sum(right) / len(right) - 0.5) < three_errors, (kind, sum(right) / len(right), len(right))


def _facts(text: str) -> list[tuple[object, ...]]:
    """Return what a caption says, as independent facts: kinds, bindings, ordered pairs, and pairs of words."""
    graph = parse_caption(text)
    assert graph is not None
    words = text.split()
    kinds = tuple(group.kind for group in graph.groups)
    found: list[tuple[object, ...]] = [("pair", *kinds), ("axis", graph.axis), *pairwise(words)]
    for group in graph.groups:
        found += [("kind", group.kind), ("binding", group.kind, group.colour)]
    return found
