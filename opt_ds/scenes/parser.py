"""The scene graph of a caption.

The grammar is that of the captions of this corpus, with every synonym. Texts outside it have no graph; `noun_phrases`
finds what they mention.
"""

import re
from collections.abc import Iterable, Mapping

from opt_ds.scenes.layout import Axis
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
)
from opt_ds.scenes.truth import Group, SceneGraph
from opt_ds.scenes.vocabulary import COLOUR_WORDS, GROUND_WORDS, KINDS, SIZE_WORDS


def parse_caption(text: str) -> SceneGraph | None:
    """Return what a caption says, or None for a text outside the grammar or one that contradicts itself.

    Case and punctuation are ignored. The caption must be complete: a word more or less makes it None.
    """
    found = _CAPTION.fullmatch(plain_words(text))
    if found is None:
        return None
    grounds = {_GROUND[phrase] for name in ("start", "end") if (phrase := found[name]) is not None}
    if len(grounds) > 1:
        return None
    ground = next(iter(grounds), None)
    template, first, second = next(each for each in _TEMPLATES if found[f"{each[0]}_{each[1]}"] is not None)
    groups = [_group(found, f"{template}_{name}") for name in (first, second) if name]
    if any(group is None for group in groups):
        return None
    named = [group for group in groups if group is not None]
    if not second:
        return SceneGraph((named[0],), None, ground)
    side = _side(found, template)
    if side is None or named[0].kind == named[1].kind:
        return None
    axis: Axis = "horizontal" if side in ("left", "right") else "vertical"
    ordered = named if side in ("left", "above") else named[::-1]
    return SceneGraph(tuple(ordered), axis, ground)


def noun_phrases(text: str) -> tuple[Group, ...]:
    """Return the groups that any text mentions, such as that of "two red cats", in their order."""
    found = (_group(match, "any_a") for match in _ANY_NOUNS.finditer(plain_words(text)))
    return tuple(group for group in found if group is not None)


def plain_words(text: str) -> str:
    """Return the text in lower case, without punctuation, its words separated by single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def _group(found: re.Match[str], name: str) -> Group | None:
    """Return the group of a noun phrase; None if its count and its noun disagree ("two cat")."""
    kind, singular, plural = _NOUNS[found[f"{name}_kind"]]
    count = _COUNT[found[f"{name}_count"]]
    if not (singular if count == 1 else plural):
        return None
    return Group(kind, count, _COLOUR.get(found[f"{name}_colour"]), _SIZE.get(found[f"{name}_size"]))


def _side(found: re.Match[str], template: str) -> str | None:
    """Return how the first named group stands to the second; None if the caption contradicts itself."""
    if template in ("relation", "with"):
        side = _SIDE_OF[template][found[f"{template}_side"]]
        return side if template == "relation" else OPPOSITE[side]
    first, second = (_SIDE_OF["places"][found[f"{template}_side_{name}"]] for name in ("a", "b"))
    return first if second == OPPOSITE[first] else None


def _inverse(words: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: name for name, options in words.items() for word in options}


def _ground_phrases(forms: tuple[str, ...]) -> dict[str, str]:
    """Return phrase -> colour of the ground."""
    return {form.format(word): ground for form in forms for ground, words in GROUND_WORDS.items() for word in words}


_COLOUR, _SIZE = _inverse(COLOUR_WORDS), _inverse(SIZE_WORDS)
_GROUND = _ground_phrases(GROUND_STARTS + GROUND_ENDS)
_COUNT = {word: count for count, options in COUNT_WORDS.items() for word in options} | {"an": 1}
_SIDE_OF = {
    "relation": _inverse(RELATIONS),
    "with": _inverse(WITH_PLACES),
    "places": {words: side for side, words in PLACES.items()},
}
#: Word -> (kind, whether it is a singular, whether it is a plural).
_NOUNS = {
    word: (kind.name, word in kind.words, word in kind.plurals)
    for kind in KINDS.values()
    for word in (*kind.words, *kind.plurals)
}


def _any_of(words: Iterable[str]) -> str:
    """Return a pattern of any of the words, the longest first."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def _nouns(name: str) -> str:
    count, size, colour, kind = _any_of(_COUNT), _any_of(_SIZE), _any_of(_COLOUR), _any_of(_NOUNS)
    adjectives = f"(?:(?P<{name}_size>{size}) )?(?:(?P<{name}_colour>{colour}) )?"
    return f"(?P<{name}>(?P<{name}_count>{count}) {adjectives}(?P<{name}_kind>{kind}))"


_FRAME = f"(?:{_any_of(FRAMES)}|(?:{_any_of(COUNTED_FRAMES)}) (?:is|are))"
_PLACE = _any_of(PLACES.values())
_RELATION = (
    f"{_nouns('relation_a')} (?:(?:is|are) )?(?P<relation_side>{_any_of(_SIDE_OF['relation'])}) {_nouns('relation_b')}"
)
_WITH = f"{_nouns('with_a')} with {_nouns('with_b')} (?P<with_side>{_any_of(_SIDE_OF['with'])})"
_PLACES = f"{_nouns('places_a')} (?P<places_side_a>{_PLACE}) and {_nouns('places_b')} (?P<places_side_b>{_PLACE})"
_PLACES_FIRST = f"(?P<first_side_a>{_PLACE}) {_nouns('first_a')} and (?P<first_side_b>{_PLACE}) {_nouns('first_b')}"
_BODY = f"(?:{_RELATION}|{_WITH}|{_PLACES}|{_PLACES_FIRST}|{_nouns('single_a')})"
#: Template -> names of its noun phrases.
_TEMPLATES = (
    ("relation", "a", "b"), ("with", "a", "b"), ("places", "a", "b"), ("first", "a", "b"), ("single", "a", ""),
)  # fmt: skip
_CAPTION = re.compile(
    f"(?:(?P<start>{_any_of(_ground_phrases(GROUND_STARTS))}) )?(?:{_FRAME} )?{_BODY}"
    f"(?: (?P<end>{_any_of(_ground_phrases(GROUND_ENDS))}))?"
)
_ANY_NOUNS = re.compile(rf"\b{_nouns('any_a')}\b")
