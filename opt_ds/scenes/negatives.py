"""Hard negatives: captions in the words of a true one that differ from the truth in one thing.

| kind | what differs |
|---|---|
| swapped | the two groups stand in each other's place |
| colours | the two groups have each other's colour |
| object | one group is of another kind |
| colour | one group has another tint |
| count | one group has one object more or fewer |
| relation | the groups stand above each other instead of side by side, or the reverse |

What is held out stays held out and the order of naming stays the same, so that a negative is as usual in itself as the
true caption.
"""

from collections.abc import Iterator
from dataclasses import replace

from opt_ds.scenes.captions import Phrasing, caption
from opt_ds.scenes.holdouts import held_out, is_binding_held_out, is_fair
from opt_ds.scenes.judging import graph_is_true
from opt_ds.scenes.random_choices import Choices
from opt_ds.scenes.truth import Group, SceneGraph
from opt_ds.scenes.vocabulary import KINDS

NEGATIVES = ("swapped", "colours", "object", "colour", "count", "relation")


def hard_negatives(
    truth: SceneGraph, mentioned: SceneGraph, phrasing: Phrasing, choices: Choices
) -> dict[str, tuple[SceneGraph, str]]:
    """Return kind -> (what the negative says, its caption). Kinds that a scene does not allow are absent.

    Args:
        truth: The complete graph of the scene.
        mentioned: What its caption says.
        phrasing: How it says that.
        choices: Chooses among several negatives of a kind.
    """
    found = {}
    for kind in NEGATIVES:
        for graph in _candidates(mentioned, kind, choices):
            if graph.is_drawable and held_out(graph) == held_out(mentioned) and not graph_is_true(graph, truth):
                found[kind] = (graph, caption(graph, _phrasing(phrasing, kind)))
                break
    return found


def difference(one: SceneGraph, other: SceneGraph) -> str | None:
    """Return the kind of negative that leads from one graph to the other; None if none alone does."""
    if one.ground != other.ground or len(one.groups) != len(other.groups) or one == other:
        return None
    if one.axis != other.axis:
        return "relation" if one.groups == other.groups else None
    if len(one.groups) == 2 and one.groups == other.groups[::-1]:
        return "swapped"
    changes = [
        (place, name)
        for place, (before, after) in enumerate(zip(one.groups, other.groups, strict=True))
        for name in ("kind", "count", "colour", "size")
        if getattr(before, name) != getattr(after, name)
    ]
    if changes == [(0, "colour"), (1, "colour")]:
        exchanged = [group.colour for group in one.groups] == [group.colour for group in other.groups[::-1]]
        return "colours" if exchanged else None
    if len(changes) > 1:
        return None
    return {"kind": "object", "colour": "colour", "count": "count"}.get(changes[0][1])


def _candidates(graph: SceneGraph, kind: str, choices: Choices) -> Iterator[SceneGraph]:
    """Yield the graphs that differ from a graph in the one thing, in random order."""
    if kind in ("swapped", "colours", "relation"):
        if len(graph.groups) == 2:
            yield from _rearranged(graph, kind)
        return
    for place in choices.shuffled(range(len(graph.groups))):
        group = graph.groups[place]
        for value in choices.shuffled(_other_values(group, kind, {each.kind for each in graph.groups})):
            yield graph.with_group(place, **{"kind" if kind == "object" else kind: value})


def _rearranged(graph: SceneGraph, kind: str) -> Iterator[SceneGraph]:
    """Yield a graph of two groups with the groups swapped, their colours exchanged, or the axis turned."""
    one, other = graph.groups
    if kind == "swapped":
        yield replace(graph, groups=(other, one))
    elif kind == "relation":
        yield replace(graph, axis="vertical" if graph.axis == "horizontal" else "horizontal")
    elif one.colour != other.colour and is_fair(graph):
        exchanged = replace(one, colour=other.colour), replace(other, colour=one.colour)
        if all(_is_drawn(group.kind, group.colour) for group in exchanged):
            yield replace(graph, groups=exchanged)


def _other_values(group: Group, kind: str, present: set[str]) -> list[str | int]:
    """Return other values of a group's kind, colour or count, which are as much held out as its own."""
    if kind == "count":
        return [group.count - 1, group.count + 1]
    names: list[tuple[str, str | None]]
    if kind == "colour":
        names = [(group.kind, colour) for colour in KINDS[group.kind].tints if group.colour not in (None, colour)]
    else:
        names = [(name, group.colour) for name in KINDS if name not in present and _is_drawn(name, group.colour)]
    held = is_binding_held_out(group.kind, group.colour)
    return [
        name if kind == "object" else str(colour) for name, colour in names if is_binding_held_out(name, colour) == held
    ]


def _is_drawn(kind: str, colour: str | None) -> bool:
    return colour is None or colour in KINDS[kind].tints


def _phrasing(phrasing: Phrasing, kind: str) -> Phrasing:
    """Return the phrasing of a negative: with the groups, their words are swapped."""
    return replace(phrasing, wordings=phrasing.wordings[::-1]) if kind == "swapped" else phrasing
