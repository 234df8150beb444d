"""Normalisation and tokenisation of texts for BLEU, CIDEr and word error rates.

Words are separated by spaces. Scripts that are written without spaces are split into characters, like Chinese in
sacrebleu's "zh" tokenizer. Otherwise a sentence would be one word, and only an identical sentence would have a correct
word. The references alone decide which scripts are split, so that texts of one language are always counted in the same
way.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

# First and last code points of the blocks of each script (Unicode 15).
_SPACELESS = {
    "Han and kana": (
        (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3031, 0x312F), (0x31A0, 0x31FF), (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF),
    ),
    "Thai": ((0x0E00, 0x0E7F),),
    "Lao": ((0x0E80, 0x0EFF),),
    "Myanmar": ((0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)),
    "Khmer": ((0x1780, 0x17FF),),
    "Tai": ((0x1950, 0x19DF), (0x1A20, 0x1AAF), (0xAA80, 0xAADF)),
    "Javanese and Balinese": ((0x1B00, 0x1B7F), (0xA980, 0xA9DF)),
    "Yi": ((0xA000, 0xA4CF),),
}  # fmt: skip
_FIRST = min(start for blocks in _SPACELESS.values() for start, _ in blocks)


@lru_cache(maxsize=1 << 14)  # the constant caption is chosen by comparing the same texts hundreds of times
def normalize(text: str) -> str:
    """Return the text in lower case and composed form (NFC), with single spaces.

    Letters with their marks, digits and apostrophes (as ') of any script are kept.
    """
    text = unicodedata.normalize("NFC", text.lower()).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return " ".join("".join(char if _is_of_a_word(char) else " " for char in text).split())


def _is_of_a_word(char: str) -> bool:
    return char in "'_" or unicodedata.category(char)[0] in "LMN"


@dataclass(frozen=True)
class Words:
    """Splits normalised texts into words. `scripts` are split into characters, each with its combining marks."""

    scripts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, references: Iterable[str]) -> "Words":
        """Return the tokenisation that the references' scripts require."""
        return cls(frozenset().union(*map(_spaceless_scripts, references)))

    @property
    def name(self) -> str:
        """Name of the tokenisation in results: "words", and the scripts that are split into characters."""
        return "; ".join(["words", *(f"characters of {script}" for script in sorted(self.scripts))])

    def spaced(self, text: str) -> str:
        """Return a normalised text with one space between words."""
        return " ".join(self.split(text))

    def split(self, text: str) -> list[str]:
        """Return a normalised text's words."""
        words: list[str] = []
        for part in text.split():
            words += self._pieces(part) if self.scripts else [part]
        return words

    def unspaced(self, text: str) -> str:
        """Return a normalised text without the spaces next to scripts that need none, as used to count characters."""
        if not self.scripts:
            return text
        joined = ""
        for word in self.split(text):
            needs_space = joined and not (self._is_cut(joined[-1]) or self._is_cut(word[0]))
            joined += f" {word}" if needs_space else word
        return joined

    def _pieces(self, part: str) -> list[str]:
        pieces: list[str] = []
        within = False  # whether the last piece is a word that further letters extend
        for char in part:
            if pieces and unicodedata.category(char)[0] == "M":
                pieces[-1] += char
            elif self._is_cut(char):
                pieces.append(char)
                within = False
            elif within:
                pieces[-1] += char
            else:
                pieces.append(char)
                within = True
        return pieces

    def _is_cut(self, char: str) -> bool:
        return _script(char) in self.scripts


@lru_cache(maxsize=1 << 14)
def _spaceless_scripts(text: str) -> frozenset[str]:
    return frozenset(script for char in set(text) if (script := _script(char)) is not None)


@lru_cache(maxsize=1 << 14)
def _script(char: str) -> str | None:
    """Return the script of a character if that script is written without spaces between words, otherwise None."""
    code = ord(char)
    if code < _FIRST or unicodedata.category(char)[0] not in "LMN":
        return None
    return next((name for name, blocks in _SPACELESS.items() if any(low <= code <= high for low, high in blocks)), None)
