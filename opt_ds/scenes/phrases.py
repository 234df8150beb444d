"""The words of captions besides those for objects and colours. `captions` writes with them and `parser` reads them."""

from opt_ds.scenes.vocabulary import with_article

#: How the first named group stands to the second -> its phrases. An index means the same kind of phrase in each.
RELATIONS = {
    "left": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over"),
    "below": ("below", "under", "underneath", "beneath"),
}
#: Where a group stands in the image.
PLACES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
#: Where the second group of "A with B ..." stands to the first.
WITH_PLACES = {
    "left": ("on the left", "to the left"),
    "right": ("on the right", "to the right"),
    "above": ("above", "overhead"),
    "below": ("below", "underneath"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

#: Count -> its words. Those for one are an article or "one".
COUNT_WORDS = {1: ("a", "one"), 2: ("two", "a pair of", "a couple of"), 3: ("three",)}

#: What may come before a caption. "there" and "here" take "is" or "are" by the number of the first group.
FRAMES = ("a picture of", "an image of", "a drawing of", "we see", "you can see")
COUNTED_FRAMES = ("there", "here")

GROUND_ENDS = (
    "on a {} background",
    "on {}",
    "on a {} ground",
    "against a {} background",
    "in front of a {} background",
    "with a {} background",
)
GROUND_STARTS = ("on a {} background", "in front of a {} background")


def count_words(count: int, choice: int, following: str) -> str:
    """Return the words for a count before the words `following`, with the article that fits."""
    options = COUNT_WORDS[count]
    word = options[choice % len(options)]
    return with_article(following) if word == "a" else f"{word} {following}"


def ground_phrase(forms: tuple[str, ...], choice: int, word: str) -> str:
    """Return a phrase for the ground, whose colour is `word`."""
    return forms[choice % len(forms)].format(word)
