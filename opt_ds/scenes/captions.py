"""Captions of a scene graph: templates, synonyms and word orders, as people describe scenes.

A `Phrasing` holds all choices, so that a caption and its hard negatives differ in what they say and not in how.
Seven of eight captions name the left or upper group first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from opt_ds.scenes.phrases import (
    COUNT_WORDS,
    COUNTED_FRAMES,
    FRAMES,
    GROUND_ENDS,
    GROUND_STARTS,
    OPPOSITE,
    PLACES,
    RELATIONS,
    WITH_PLACES,
    count_words,
    ground_phrase,
)
from opt_ds.scenes.random_choices import Choices
from opt_ds.scenes.truth import SIDES_OF_AXIS, Group, SceneGraph
from opt_ds.scenes.vocabulary import COLOUR_WORDS, GROUND_WORDS, KINDS, SIZE_WORDS

#: Share of captions of two groups that name the left or upper one first.
READING_ORDER_SHARE = 0.875
_GROUND_SHARE = 0.85  # of captions that mention the ground
_ATTEMPTS = 50  # to find another caption of the same scene

#: Template -> weight. The last two say "is" or "are", which a swap could change: both groups are then single objects.
_TEMPLATES = {"relation": 0.44, "places": 0.16, "places first": 0.1, "with": 0.14, "copula": 0.16}
_SINGULAR_ONLY = ("copula",)


@dataclass(frozen=True)
class Wording:
    """The choices of words for one group. An index is taken modulo the number of its options."""

    kind: int = 0
    count: int = 0
    size: int = 0
    colour: int = 0


@dataclass(frozen=True)
class Phrasing:
    """The choices of a caption. `reverse`: the right or lower group comes first."""

    template: str = "relation"
    wordings: tuple[Wording, ...] = (Wording(), Wording())
    reverse: bool = False
    relation: int = 0
    frame: str = ""
    ground: int = 0
    ground_first: bool = False


def caption(graph: SceneGraph, phrasing: Phrasing) -> str:
    """Return the caption of a scene graph. A ground of None is not mentioned."""
    nouns = [noun_phrase(group, words) for group, words in zip(graph.groups, phrasing.wordings, strict=False)]
    if graph.axis is None:
        body, first = nouns[0], graph.groups[0]
    else:
        sides, groups = list(SIDES_OF_AXIS[graph.axis]), list(graph.groups)
        if phrasing.reverse:
            for items in (nouns, sides, groups):
                items.reverse()
        body, first = _BODIES[phrasing.template](nouns, sides, groups, phrasing.relation), groups[0]
    if phrasing.frame in COUNTED_FRAMES:
        body = f"{phrasing.frame} {'is' if first.count == 1 else 'are'} {body}"
    elif phrasing.frame:
        body = f"{phrasing.frame} {body}"
    if graph.ground is None:
        return body
    words = GROUND_WORDS[graph.ground]
    word = words[phrasing.ground % len(words)]
    if phrasing.ground_first:
        return f"{ground_phrase(GROUND_STARTS, phrasing.ground, word)} {body}"
    return f"{body} {ground_phrase(GROUND_ENDS, phrasing.ground, word)}"


def noun_phrase(group: Group, wording: Wording) -> str:
    """Return the words for a group, such as "two small red cats"."""
    kind = KINDS[group.kind]
    forms = kind.words if group.count == 1 else kind.plurals
    words = [forms[wording.kind % len(forms)]]
    if group.colour is not None:
        words.insert(0, _chosen(COLOUR_WORDS[group.colour], wording.colour))
    if group.size is not None:
        words.insert(0, _chosen(SIZE_WORDS[group.size], wording.size))
    return count_words(group.count, wording.count, " ".join(words))


def random_phrasing(graph: SceneGraph, choices: Choices) -> tuple[SceneGraph, Phrasing]:
    """Return what a caption mentions (the graph, in some captions without the ground), and how."""
    singular = all(group.count == 1 for group in graph.groups)
    templates = {name: weight for name, weight in _TEMPLATES.items() if singular or name not in _SINGULAR_ONLY}
    template = choices.weighted(templates) if graph.axis is not None else "relation"
    wordings = tuple(_random_wording(choices) for _ in graph.groups)
    reverse = graph.axis is not None and choices.chance(1 - READING_ORDER_SHARE)
    # A frame with "is" or "are" would change with a swap of two groups of different numbers.
    frames = FRAMES + (COUNTED_FRAMES * 2 if singular or graph.axis is None else ())
    framed = template not in ("copula", "places first") and choices.chance(0.5)
    phrasing = Phrasing(
        template=template,
        wordings=wordings,
        reverse=reverse,
        relation=choices.below(len(RELATIONS["left"])),
        frame=choices.one_of(frames) if framed else "",
        ground=choices.below(len(GROUND_ENDS)),
        ground_first=not framed and template != "places first" and choices.chance(0.2),
    )
    mentioned = graph if choices.chance(_GROUND_SHARE) else replace(graph, ground=None)
    return mentioned, phrasing


def different_captions(graph: SceneGraph, choices: Choices, count: int) -> list[tuple[str, SceneGraph, Phrasing]]:
    """Return `count` different captions of a scene, each with what it mentions and its phrasing."""
    found: dict[str, tuple[SceneGraph, Phrasing]] = {}
    for _ in range(_ATTEMPTS):
        mentioned, phrasing = random_phrasing(graph, choices)
        found.setdefault(caption(mentioned, phrasing), (mentioned, phrasing))
        if len(found) == count:
            break
    return [(text, *how) for text, how in found.items()]


def _relation(nouns: list[str], sides: list[str], groups: list[Group], choice: int) -> str:
    return f"{nouns[0]} {_chosen(RELATIONS[sides[0]], choice)} {nouns[1]}"


def _copula(nouns: list[str], sides: list[str], groups: list[Group], choice: int) -> str:
    verb = "is" if groups[0].count == 1 else "are"
    return f"{nouns[0]} {verb} {_chosen(RELATIONS[sides[0]], choice)} {nouns[1]}"


def _places(nouns: list[str], sides: list[str], groups: list[Group], choice: int) -> str:
    return f"{nouns[0]} {PLACES[sides[0]]} and {nouns[1]} {PLACES[sides[1]]}"


def _places_first(nouns: list[str], sides: list[str], groups: list[Group], choice: int) -> str:
    return f"{PLACES[sides[0]]} {nouns[0]} and {PLACES[sides[1]]} {nouns[1]}"


def _with(nouns: list[str], sides: list[str], groups: list[Group], choice: int) -> str:
    return f"{nouns[0]} with {nouns[1]} {_chosen(WITH_PLACES[OPPOSITE[sides[0]]], choice)}"


_BODIES: dict[str, Callable[[list[str], list[str], list[Group], int], str]] = {
    "relation": _relation,
    "copula": _copula,
    "places": _places,
    "places first": _places_first,
    "with": _with,
}


def _random_wording(choices: Choices) -> Wording:
    plain = choices.chance(0.7)  # the usual word for a count, rather than "one" or "a pair of"
    return Wording(
        kind=0 if choices.chance(0.6) else 1,
        count=0 if plain else choices.below(max(len(words) for words in COUNT_WORDS.values())),
        size=choices.below(max(len(words) for words in SIZE_WORDS.values())),
        colour=choices.below(2),
    )


def _chosen(options: tuple[str, ...], choice: int) -> str:
    return options[choice % len(options)]
