"""Nearly equal file names in a folder (a.JPG and A.txt, images/a.jpg and captions/a.txt).

Such files were probably meant to be one sample. They are not joined, since that would be a guess, but reported to the
user.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opt_ds.decoding.file_kinds import kind_of_name

_KIND_WORDS = frozenset((
    "image", "images", "img", "imgs", "pic", "pics", "picture", "pictures", "photo", "photos", "jpg", "jpeg", "png",
    "caption", "captions", "text", "texts", "txt", "txts", "annotation", "annotations", "sentence", "sentences",
    "transcript", "transcripts", "transcription", "transcriptions", "label", "labels", "audio", "audios", "wav",
    "wavs", "flac", "mp3", "sound", "sounds", "speech", "recording", "recordings", "clip", "clips",
))  # fmt: skip
_TRANSCRIPTS = ".trans"  # LibriSpeech: 84-1.trans.txt has the texts of 84-1-0000.flac, 84-1-0001.flac and so on


@dataclass(frozen=True)
class NearPair:
    """Two names with a small difference, and a description of the difference."""

    first: str
    second: str
    difference: str


def near_pairs(kinds_of: Mapping[str, frozenset[str]], splits: Mapping[str, str]) -> list[NearPair]:
    """Return pairs of names with nearly the same spelling and no kind of file in common. A name occurs at most once.

    `kinds_of` maps a name (a path without ending) to the kinds of its files. `splits` holds the top-level folders that
    are splits; names are compared within a split only.
    """
    if len(set().union(*kinds_of.values())) < 2:
        return []
    pairs: list[NearPair] = []
    left = dict(kinds_of)
    for difference, key_of in _WAYS:
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, kinds in left.items():
            top, key = name.split("/")[0], key_of(name, kinds)
            if key is not None:
                groups[splits.get(top) or "", key].append(name)
        for names in groups.values():
            other = next((name for name in names[1:] if not left[name] & left[names[0]]), None)
            if other is not None:
                pairs.append(NearPair(names[0], other, difference))
                del left[names[0]], left[other]
    return pairs


def _folded(name: str, _: frozenset[str]) -> str:
    return name.casefold()


def _without_ending(name: str, kinds: frozenset[str]) -> str:
    """Strip a second ending that names a kind of file, such as .jpg of a.jpg.txt.

    For texts strip any: 1.normalized -> 1.
    """
    stem, ending = os.path.splitext(name.casefold())
    return stem if kinds == {"text"} or kind_of_name(name) is not None else stem + ending


def _speaker_chapter(name: str, kinds: frozenset[str]) -> str | None:
    """Return the LibriSpeech chapter of a name: 84-1.trans -> 84-1, and 84-1-0000 -> 84-1."""
    if kinds == {"text"}:
        return name.removesuffix(_TRANSCRIPTS) if name.endswith(_TRANSCRIPTS) else None
    return name.rpartition("-")[0] or None


def _without_kind_folders(name: str, kinds: frozenset[str]) -> str:
    *folders, last = _without_ending(name, kinds).split("/")
    return "/".join([*(part for part in folders if part not in _KIND_WORDS), last])


def _last_part(name: str, kinds: frozenset[str]) -> str | None:
    return _without_ending(name, kinds).split("/")[-1] if len(kinds) == 1 else None


_WAYS: tuple[tuple[str, Callable[[str, frozenset[str]], str | None]], ...] = (
    ("differ in case", _folded),
    ("differ in more than the ending", _without_ending),
    ("are audio and a file of several transcripts", _speaker_chapter),
    ("lie in different folders", _without_kind_folders),
    ("lie in different folders", _last_part),
)
