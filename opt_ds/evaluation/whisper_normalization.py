"""Whisper's normalisers of transcripts (Radford et al. 2022, appendix C), for error rates that others publish too.

The English normaliser also unifies spelling, contractions, numbers and units. The basic normaliser is for all other
languages: it lower-cases a text and removes punctuation, symbols and what stands in brackets. Texts in scripts without
spaces are split into characters by it, as Whisper's evaluation does. The word error rate is then a character error rate.

Both are the classes of `transformers`. The table of British and American spellings is that of the package
`whisper-normalizer`, because `transformers` has it only in the folders of models.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.resources import files

from opt_ds.errors import UserError
from opt_ds.evaluation.words import Words
from opt_ds.extras import needs_extra

#: Name of a normaliser -> how it is called where it is printed. The name is part of the keys of its figures.
NORMALIZERS = {"english": "Whisper's English normaliser", "basic": "Whisper's basic normaliser"}

Normalizer = Callable[[str], str]


def whisper_normalizers(split_letters: bool) -> tuple[dict[str, Normalizer], list[str]]:
    """Return name -> normaliser, and why normalisers are missing, one line each.

    `split_letters`: the texts are in scripts without spaces (see `is_spaceless`). The basic normaliser splits them into
    characters, and the English one is left out.
    """
    found = {"basic": _basic(split_letters)}
    if split_letters:
        return found, []
    try:
        return {"english": _english(), **found}, []
    except UserError as error:
        return found, [str(error)]


def is_spaceless(texts: Iterable[str]) -> bool:
    """Return whether most letters of the texts belong to scripts that are written without spaces."""
    times = Counter(char for text in texts for char in text)
    letters = {char: count for char, count in times.items() if unicodedata.category(char)[0] == "L"}
    spaceless = sum(count for char, count in letters.items() if Words.of([char]).scripts)
    return 2 * spaceless > sum(letters.values())


@lru_cache(maxsize=1)
def _english() -> Normalizer:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    with needs_extra("downstream", f"the error rate by {NORMALIZERS['english']}"):
        package = files("whisper_normalizer")
    table = package.joinpath("normalizers", "english.json").read_text(encoding="utf-8")
    return _cached(EnglishTextNormalizer(json.loads(table)))


@lru_cache(maxsize=2)
def _basic(split_letters: bool) -> Normalizer:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return _cached(BasicTextNormalizer(split_letters=split_letters))


def _cached(normalizer: Normalizer) -> Normalizer:
    """Return the normaliser without spaces at the ends, with a cache: controls normalise the same references again."""
    return lru_cache(maxsize=1 << 14)(lambda text: normalizer(text).strip())
