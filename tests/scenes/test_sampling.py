"""Test the splits: training shows no held-out pair or binding in images or words, and no scene occurs twice."""

from collections import Counter, defaultdict
from itertools import combinations, islice
from typing import Any

from opt_ds.scenes.holdouts import held_out, held_out_colours, is_pair_held_out, twin
from opt_ds.scenes.layout import layouts
from opt_ds.scenes.parser import noun_phrases
from opt_ds.scenes.pictograms import FILLED, OUTLINED
from opt_ds.scenes.sampling import COMPOSITION, SPLITS, STYLE, scenes, split_of
from opt_ds.scenes.truth import Scene
from opt_ds.scenes.vocabulary import CATEGORIES, KINDS


def test_what_is_held_out_is_in_one_split_alone(described: list[Any]) -> None:
    seen: dict[bool, set[object]] = defaultdict(set)
    for each in described:
        for groups in (each.scene.graph.groups, *(noun_phrases(text) for text, _, _ in each.captions)):
            seen[each.split == COMPOSITION] |= (
                {frozenset(group.kind for group in groups)} if len(groups) == 2 else set()
            )
            seen[each.split == COMPOSITION] |= {(group.kind, group.colour) for group in groups if group.colour}
        assert bool(held_out(each.scene.graph)) == (each.split == COMPOSITION)
    pairs = {pair for pair in map(frozenset, combinations(KINDS, 2)) if is_pair_held_out(*pair)}
    bindings = {(kind, colour) for kind in KINDS for colour in held_out_colours(kind)}
    assert not seen[False] & (pairs | bindings)
    assert len(seen[True] & pairs) > 40 and len(seen[True] & bindings) > 30


def test_enough_is_left_for_training() -> None:
    pairs = list(combinations(KINDS, 2))
    assert 0.1 < sum(is_pair_held_out(*pair) for pair in pairs) / len(pairs) < 0.18
    assert sum(bool(held_out_colours(kind)) for kind in KINDS) >= 16
    for name, kind in KINDS.items():
        assert len(set(kind.tints) - set(held_out_colours(name))) >= 2, name
        assert twin(twin(name)) == name and held_out_colours(name) == held_out_colours(twin(name))


def test_both_kinds_of_composition_are_tested(described: list[Any]) -> None:
    held = Counter(held_out(each.scene.graph) for each in described if each.split == COMPOSITION)
    assert held["pair",] > 0.4 * held.total()
    assert held["pair", "binding"] > 0.15 * held.total() and held["binding",] > 0.02 * held.total()


def test_scenes_are_different_and_varied(described: list[Any]) -> None:
    graphs = [each.scene.graph for each in described]
    assert len(set(graphs)) == len(graphs)
    kinds = Counter(group.kind for graph in graphs for group in graph.groups)
    assert set(kinds) == set(KINDS) and max(kinds.values()) < 3 * min(kinds.values())
    assert len(KINDS) >= 40 and len(CATEGORIES) == 4
    shapes = Counter((graph.extents, graph.axis) for graph in graphs)
    assert set(shapes) == set(layouts())
    assert all(group.colour != graph.ground for graph in graphs for group in graph.groups)


def test_splits_do_not_depend_on_the_size() -> None:
    splits = Counter(split_of(number) for number in range(16_000))
    assert splits == {"train": 14_000, "valid": 400, "test_composition": 800, "test_voice": 400, "test_style": 400}
    assert set(SPLITS) == {split_of(number) for number in range(8)}
    assert list(islice(scenes(3), 30)) == list(islice(scenes(3), 60))[:30]
    assert list(islice(scenes(4), 30)) != list(islice(scenes(3), 30))


def test_the_style_is_held_out(described: list[Any]) -> None:
    assert all(each.scene.style == (OUTLINED if each.split == STYLE else FILLED) for each in described)


def test_a_scene_survives_json(described: list[Any]) -> None:
    for each in described[:100]:
        assert Scene.from_json(each.scene.to_json()) == each.scene
        assert len(each.scene.to_json()["objects"]) == sum(group.count for group in each.scene.graph.groups)
