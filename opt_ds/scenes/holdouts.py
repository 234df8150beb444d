"""What training never shows: pairs of kinds, and bindings of a colour to a kind. Both are in `test_composition` only.

Pairs are held out whole: neither order, relation, count nor colour of a held-out pair is in training. A caption with
its two groups swapped is therefore as unseen as the true one.

Kinds are grouped in twos. Of some such twins, two colours are held out for both, so that exchanging their colours leads
from one held-out binding to another. Twins are a held-out pair too.
"""

from functools import cache

from opt_ds.scenes.random_choices import stable_hash
from opt_ds.scenes.truth import SceneGraph
from opt_ds.scenes.vocabulary import KINDS

#: Colours that are held out together. They differ clearly.
_COLOUR_PAIRS = (("red", "blue"), ("yellow", "purple"), ("orange", "green"))
_PAIRS_IN = 8  # 1 in N pairs of kinds is held out, besides twins
_BINDINGS_IN = 3  # 2 in N twins have held-out bindings, where their own colours allow


@cache
def is_pair_held_out(one: str, other: str) -> bool:
    """Return whether training never shows these two kinds together."""
    return twin(one) == other or stable_hash("pair", *sorted((one, other))) % _PAIRS_IN == 0


def is_binding_held_out(kind: str, colour: str | None) -> bool:
    """Return whether training never shows this kind in this colour. None (its own colours) is never held out."""
    return colour in held_out_colours(kind)


def held_out_colours(kind: str) -> tuple[str, ...]:
    """Return the tints that training never shows of a kind: two or none."""
    return _held_out()[kind][1]


def twin(kind: str) -> str:
    """Return the kind with the same held-out colours."""
    return _held_out()[kind][0]


def held_out(graph: SceneGraph) -> tuple[str, ...]:
    """Return what of a scene training never shows: "pair", "binding", both or nothing."""
    kinds = [group.kind for group in graph.groups]
    pair = len(kinds) == 2 and is_pair_held_out(*kinds)
    binding = any(is_binding_held_out(group.kind, group.colour) for group in graph.groups)
    return (*(["pair"] if pair else []), *(["binding"] if binding else []))


def is_fair(graph: SceneGraph) -> bool:
    """Return whether exchanging the colours of the two groups leaves what is held out the same."""
    if len(graph.groups) == 1:
        return True
    one, other = graph.groups
    return all(
        is_binding_held_out(one.kind, colour) == is_binding_held_out(other.kind, colour)
        for colour in (one.colour, other.colour)
    )


@cache
def _held_out() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return kind -> (its twin, its held-out colours)."""
    order = sorted(KINDS, key=lambda kind: stable_hash("twins", kind))
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for index in range(0, len(order), 2):
        one, other = order[index : index + 2]
        turn = index // 2
        fitting = [pair for pair in _COLOUR_PAIRS if set(pair) <= set(KINDS[one].tints) & set(KINDS[other].tints)]
        colours = fitting[turn % len(fitting)] if fitting and turn % _BINDINGS_IN else ()
        found[one], found[other] = (other, colours), (one, colours)
    return found
