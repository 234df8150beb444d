"""What a scene can show, and the words for it: kinds of objects, colours, sizes, grounds.

A kind is drawn by a pictogram of OpenMoji. The first word of each is its name in scene graphs; the others are synonyms.
"""

from dataclasses import dataclass
from functools import cached_property

Rgb = tuple[int, int, int]

#: The largest number of objects in a scene.
MOST_OBJECTS = 3


@dataclass(frozen=True)
class Kind:
    """A kind of object.

    `code`: the code point of its pictogram. `words`: singular forms, the name first. `plurals`: their plurals.
    `own_colour`: the colour that people would give the untinted pictogram, if it is one of COLOURS. `untinted`:
    colours in which the pictogram would look like the untinted one; it is never drawn in them.
    """

    name: str
    code: str
    category: str
    words: tuple[str, ...]
    plurals: tuple[str, ...]
    own_colour: str | None
    untinted: frozenset[str]

    @cached_property
    def tints(self) -> tuple[str, ...]:
        """The colours that the pictogram is drawn in, besides its own."""
        return tuple(colour for colour in COLOURS if colour not in self.untinted)


def _kinds(category: str, *rows: str) -> list[Kind]:
    """Return the kinds of rows: code point, own colour and colours that look like it ("-": none), words with plurals.

    A word's plural follows a colon, or adds an "s".
    """
    kinds = []
    for row in rows:
        code, colours, words = row.split(" ", 2)
        own, *alike = (None if name == "-" else name for name in colours.split(","))
        forms = [form.partition(":") for form in words.split("/")]
        singular = tuple(form for form, _, _ in forms)
        plurals = tuple(plural or f"{form}s" for form, _, plural in forms)
        untinted = frozenset(name for name in (own, *alike) if name)
        kinds.append(Kind(singular[0], code, category, singular, plurals, own, untinted))
    return kinds


_ALL = [
    *_kinds(
        "animal",
        "1F408 orange,yellow cat",
        "1F415 orange,yellow dog",
        "1F40E - horse",
        "1F404 - cow",
        "1F416 - pig/hog",
        "1F407 - rabbit/bunny:bunnies",
        "1F401 - mouse:mice",
        "1F418 - elephant",
        "1F426 -,red,orange bird",
        "1F989 - owl",
        "1F986 - duck",
        "1F41F blue fish:fish",
        "1F40B blue whale",
        "1F40C - snail",
        "1F422 green turtle/tortoise",
        "1F98B blue butterfly:butterflies",
    ),
    *_kinds(
        "food",
        "1F34E red apple",
        "1F34C yellow,orange banana",
        "1F34B yellow lemon",
        "1F353 red strawberry:strawberries",
        "1F955 orange,yellow carrot",
        "1F350 green,yellow pear",
        "1F344 red mushroom/toadstool",
        "1F355 yellow,orange pizza",
        "1F382 -,yellow cake",
        "1F354 -,orange hamburger/burger",
    ),
    *_kinds(
        "vehicle",
        "1F697 red car/automobile",
        "1F69C - tractor",
        "1F6B2 - bicycle/bike",
        "1F682 - train/locomotive",
        "1F680 - rocket/spaceship",
        "2708 - airplane/plane",
        "26F5 - sailboat/boat",
        "1F681 -,red,orange helicopter/chopper",
    ),
    *_kinds(
        "thing",
        "1F511 orange,yellow key",
        "1F4F7 - camera",
        "2602 purple umbrella/parasol",
        "1F3B8 red,orange guitar",
        "1F941 red drum",
        "1F451 yellow crown",
        "1FA91 yellow,orange chair",
        "1F514 yellow bell",
        "1F3E0 - house",
        "1F333 green tree",
        "2764 red heart",
        "2B50 yellow star",
        "1F381 - present/gift",
        "1F388 red balloon",
    ),
]
#: Name -> kind.
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
CATEGORIES = tuple(dict.fromkeys(kind.category for kind in _ALL))

#: Tints of objects.
COLOURS: dict[str, Rgb] = {
    "red": (222, 40, 48),
    "orange": (255, 140, 0),
    "yellow": (250, 214, 20),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (140, 50, 190),
}
#: Colours of the ground, paler than those of objects.
GROUNDS: dict[str, Rgb] = {
    "white": (255, 255, 255),
    "grey": (190, 190, 190),
    "yellow": (255, 244, 170),
    "green": (190, 235, 180),
    "blue": (180, 215, 255),
    "pink": (255, 200, 220),
}
COLOUR_WORDS = {name: (name,) for name in COLOURS} | {"purple": ("purple", "violet")}
GROUND_WORDS = {name: (name,) for name in GROUNDS} | {"grey": ("grey", "gray")}

#: Sizes that captions name; an object of no size is between them.
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}


def with_article(words: str) -> str:
    """Return the words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
