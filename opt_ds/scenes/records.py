"""The truth file of a corpus: what each sample shows and says, one JSON object per line."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.scenes.truth import Scene

#: Name of the truth file, next to the manifest.
TRUTH_FILE = "truth.jsonl"


@dataclass(frozen=True)
class Speech:
    """How a caption was spoken.

    `voice`: name of the voice. `length_scale`: duration relative to the voice's normal speed; above 1 is slower.
    `joined`: recordings of words and phrases were joined; otherwise the caption was spoken as a whole.
    """

    voice: str
    length_scale: float
    joined: bool


@dataclass(frozen=True)
class SceneRecord:
    """A sample of the corpus.

    `id`: that of the manifest. `held_out`: what of the scene training never shows ("pair", "binding"). `captions`:
    several true captions; the first one is that of the manifest. `negatives`: kind -> a false caption in the words of
    the first one. `speech`: None in a corpus without speech.
    """

    id: str
    split: str
    scene: Scene
    held_out: tuple[str, ...]
    captions: tuple[str, ...]
    negatives: dict[str, str]
    speech: Speech | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {**asdict(self), "scene": self.scene.to_json()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "SceneRecord":
        """Return the record that `to_json` returned the values of."""
        speech = fields["speech"]
        return cls(
            id=fields["id"],
            split=fields["split"],
            scene=Scene.from_json(fields["scene"]),
            held_out=tuple(fields["held_out"]),
            captions=tuple(fields["captions"]),
            negatives=dict(fields["negatives"]),
            speech=None if speech is None else Speech(**speech),
        )


def truth_lines(records: Iterable[SceneRecord]) -> Iterator[str]:
    """Yield the lines of the truth file."""
    for record in records:
        yield json.dumps(record.to_json(), ensure_ascii=False) + "\n"


def read_truth(path: Path) -> dict[str, SceneRecord]:
    """Return id -> record of a truth file.

    Raises:
        UserError: The file does not exist or is not a truth file.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file: give the {TRUTH_FILE} that `opt-ds corpus scenes` writes next to its manifest"
        )
    records: dict[str, SceneRecord] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = SceneRecord.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}: line {number} is not the truth of a scene: write the corpus again") from None
            records[record.id] = record
    return records
