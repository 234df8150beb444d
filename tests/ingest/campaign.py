"""A folder of mixed real files with seeded faults, for the campaigns: what is in it and what must be reported."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from tests.decoding.wild_files import WILD

_WORDS = ("red", "green", "dog", "cat", "runs", "sleeps", "house", "tree", "under", "blue", "small", "two")


def write_folder(folder: Path, num_files: int, num_faults: int) -> tuple[set[str], dict[str, str]]:
    """Write about `num_files` images, texts and audio files, of which `num_faults` are invalid.

    Returns the ids of the good samples, and id -> what the reason of a bad one must contain.
    """
    random = np.random.default_rng(5)
    faults = _faults(num_faults)
    expected: dict[str, str] = {}
    good: set[str] = set()
    written = number = 0
    every = max(1, num_files // (3 * num_faults))
    folder.mkdir(parents=True)
    while written < num_files:
        name = f"{number % 7}/sample-{number:05d}"
        (folder / name).parent.mkdir(exist_ok=True)
        kinds = ("jpg", "wav", "txt") if number % 3 == 0 else (("png", "txt") if number % 3 == 1 else ("webp",))
        for kind in kinds:
            _write(folder / f"{name}.{kind}", kind, random)
        written += len(kinds)
        if number % every == 0 and (fault := next(faults, None)) is not None:
            ending, write, reason = fault
            for old in folder.glob(f"{name}.*"):
                if old.suffix != ".txt" or ending == "txt":
                    old.unlink()
            write(folder / f"{name}.{ending}")
            expected[name] = reason
        else:
            good.add(name)
        number += 1
    assert len(expected) == num_faults, "more files are needed for so many faults"
    return good, expected


def _write(path: Path, kind: str, random: np.random.Generator) -> None:
    if kind == "txt":
        path.write_text(" ".join(random.choice(_WORDS, random.integers(2, 9))), encoding="utf-8")
    elif kind == "wav":
        rate_hz = int(random.choice([8000, 16000, 44100]))
        soundfile.write(path, 0.1 * random.standard_normal((int(0.3 * rate_hz), int(random.integers(1, 3)))), rate_hz)
    else:
        size = tuple(random.integers(20, 60, 2))
        Image.fromarray(random.integers(0, 256, (*size, 3), "uint8")).save(path)


def _faults(count: int) -> Iterator[tuple[str, object, str]]:
    """Yield (file ending, writer, reason), each kind of bad file in turn."""
    bad = [file for file in WILD if file.reason is not None and file.name != "long.wav"]
    texts = [
        ("txt", lambda path: path.write_bytes(b"caf\xe9"), "the text is not UTF-8"),
        ("txt", lambda path: path.write_text(" \n"), "the text is empty"),
        ("txt", lambda path: path.write_text("\x01\x02\u200b"), "the text has no tokens"),
    ]
    kinds = [(file.name.rsplit(".", 1)[1], file.write, _without_name(file.reason or "")) for file in bad]
    kinds = [*texts, *kinds]
    for index in range(count):
        yield kinds[index % len(kinds)]


def _without_name(reason: str) -> str:
    return reason.split(": ")[0]
