"""Random scene graphs of each split. Every scene is different."""

from collections.abc import Iterator
from dataclasses import replace

from opt_ds.scenes.holdouts import held_out, held_out_colours, is_fair, is_pair_held_out, twin
from opt_ds.scenes.layout import Axis
from opt_ds.scenes.pictograms import FILLED, OUTLINED
from opt_ds.scenes.random_choices import Choices
from opt_ds.scenes.truth import Group, Scene, SceneGraph
from opt_ds.scenes.vocabulary import COLOURS, GROUNDS, KINDS

TRAIN, VALID = "train", "valid"
COMPOSITION, VOICE, STYLE = "test_composition", "test_voice", "test_style"
SPLITS = (TRAIN, VALID, COMPOSITION, VOICE, STYLE)

#: Of 40 consecutive samples, those that are not for training. The beginning of a corpus has all splits.
_CYCLE = 40
_SPLIT_AT = {1: VALID, 2: COMPOSITION, 3: VOICE, 4: STYLE, 22: COMPOSITION}
_SINGLE_SHARE = 0.2  # of scenes with one group
_TINTED_SHARE = 0.6  # of groups
# A random change of one count, as in a hard negative, is as probable as its reverse. So no count is a priori likelier.
_SINGLE_COUNTS: dict[tuple[int, ...], float] = {(1,): 0.25, (2,): 0.5, (3,): 0.25}
_PAIR_COUNTS: dict[tuple[int, ...], float] = {(1, 1): 0.5, (1, 2): 0.25, (2, 1): 0.25}
_SIZES = {None: 0.5, "small": 0.25, "large": 0.25}
_ATTEMPTS = 2_000  # to find a new scene of the chosen form
_BINDING_SHARE = 0.4  # of the scenes of test_composition: held-out bindings; the others have a held-out pair


def split_of(index: int) -> str:
    """Return the split of the sample at an index, which does not depend on the size of the corpus."""
    return _SPLIT_AT.get(index % _CYCLE, TRAIN)


def scenes(seed: int) -> Iterator[Scene]:
    """Yield the scenes of a corpus without end. The first N are the same for every N."""
    seen: set[SceneGraph] = set()
    index = 0
    while True:
        split = split_of(index)
        graph = _unseen(Choices("scene", seed, index), split, seen)
        seen.add(graph)
        yield Scene(graph, OUTLINED if split == STYLE else FILLED)
        index += 1


def _unseen(choices: Choices, split: str, seen: set[SceneGraph]) -> SceneGraph:
    """Return a random graph of a split that is not in `seen`."""
    while True:
        binding = split == COMPOSITION and choices.chance(_BINDING_SHARE)
        single = choices.chance(_SINGLE_SHARE) and (split != COMPOSITION or binding)
        for _ in range(_ATTEMPTS):  # a large corpus may have all scenes of a kind already
            graph = _graph(choices, split, single, binding)
            if graph is not None and graph not in seen:
                return graph


def _graph(choices: Choices, split: str, single: bool, binding: bool) -> SceneGraph | None:
    """Return a random scene graph, or None if it does not belong to the split.

    Args:
        choices: The source of randomness.
        split: The split.
        single: Whether it has one group.
        binding: Whether it has a held-out binding. Its two kinds are then twins.
    """
    kinds = [choices.one_of(tuple(KINDS))]
    if not single:
        kinds.append(twin(kinds[0]) if binding else choices.one_of(tuple(KINDS)))
    if len(set(kinds)) < len(kinds) or (not single and split != COMPOSITION and is_pair_held_out(*kinds)):
        return None
    axis: Axis | None = None if single else choices.one_of(("horizontal", "vertical"))
    counts = choices.weighted(_SINGLE_COUNTS if single else _PAIR_COUNTS)
    groups = tuple(
        Group(kind, count, _colour(choices), choices.weighted(_SIZES))
        for kind, count in zip(kinds, counts, strict=True)
    )
    if any(group.colour not in (None, *KINDS[group.kind].tints) for group in groups):
        return None
    graph = SceneGraph(groups, axis, choices.one_of(tuple(GROUNDS)))
    if binding:
        graph = _with_held_out_colours(choices, graph)
    wanted = _is_of_composition(graph, binding) if split == COMPOSITION else not held_out(graph)
    return graph if wanted and graph.is_drawable and _is_clear(graph) else None


def _colour(choices: Choices) -> str | None:
    """Return a tint or None. All tints are as frequent, for every kind that has them."""
    return choices.one_of(tuple(COLOURS)) if choices.chance(_TINTED_SHARE) else None


def _with_held_out_colours(choices: Choices, graph: SceneGraph) -> SceneGraph:
    """Return the graph with held-out colours: one group or both, which are twins."""
    colours: list[str | None] = list(held_out_colours(graph.groups[0].kind))
    if not colours:
        return graph
    if choices.chance(0.5):
        colours.reverse()
    if len(graph.groups) == 2 and choices.chance(0.25):
        colours[choices.below(2)] = None
    groups = tuple(replace(group, colour=colour) for group, colour in zip(graph.groups, colours, strict=False))
    return replace(graph, groups=groups)


def _is_of_composition(graph: SceneGraph, binding: bool) -> bool:
    held = held_out(graph)
    return "binding" in held if binding else held == ("pair",) and is_fair(graph)


def _is_clear(graph: SceneGraph) -> bool:
    """Return whether no group has the colour of the ground."""
    return all(group.colour is None or group.colour != graph.ground for group in graph.groups)
