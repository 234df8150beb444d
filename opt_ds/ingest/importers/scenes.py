"""The built-in corpus `scenes`: OpenMoji pictograms on coloured grounds, their captions spoken, with ground truth.

    manifest.jsonl   the samples, for `opt-ds prepare`
    images/          PNG
    audio/           16 kHz FLAC
    truth.jsonl      what each sample shows, further true captions, hard negatives (opt_ds/scenes/records.py)
    questions/       questions and answers of each split, in VQA v2's format, for `opt-ds import vqa`
    corpus.json      seed and version
    attribution.json

A sample depends on the seed and its number only: a smaller corpus is the beginning of a larger one.
"""

import json
import logging
import os
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.importers.processes import in_processes
from opt_ds.ingest.importers.scene_speech import (
    HELD_OUT_VOICE,
    PIPER_VOICE,
    VOICES,
    Recording,
    choose_speech,
    speak_captions,
)
from opt_ds.ingest.importers.speech_synthesis import check_piper
from opt_ds.ingest.manifest import ManifestLine, write_manifest
from opt_ds.scenes.captions import different_captions
from opt_ds.scenes.drawing import png_bytes
from opt_ds.scenes.holdouts import held_out
from opt_ds.scenes.labels import scene_labels
from opt_ds.scenes.negatives import hard_negatives
from opt_ds.scenes.questions import Question, scene_questions, vqa_files
from opt_ds.scenes.random_choices import Choices
from opt_ds.scenes.records import TRUTH_FILE, SceneRecord, truth_lines
from opt_ds.scenes.sampling import SPLITS, scenes, split_of
from opt_ds.scenes.truth import Scene
from opt_ds.store.files import atomic_file, exclusive_use, write_json

_LOG = logging.getLogger(__name__)
DEFAULT_SAMPLES, DEFAULT_SEED = 16_000, 1
#: Number of captions of a scene in the truth file.
CAPTIONS = 4
ATTRIBUTION = {
    "corpus": "scenes",
    "pictures": "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0. "
    "Tinted and composed here; the images are under the same license.",
    "speech": f"synthesised by Piper (GPL-3.0, run as a tool) with the voice en_US-{PIPER_VOICE}-medium and by eSpeak "
    "NG (GPL-3.0, run as a tool, part of piper-tts) with the voices "
    + ", ".join(name for name in (*VOICES, HELD_OUT_VOICE) if name != PIPER_VOICE),
}
_VERSION = 1  # of the samples: a folder with others is not completed
_KEY_FILE = "corpus.json"


@dataclass(frozen=True)
class _Task:
    """A sample to be described and drawn."""

    number: int
    scene: Scene
    seed: int
    output: Path


def write_scenes_corpus(
    output: Path,
    *,
    samples: int = DEFAULT_SAMPLES,
    seed: int = DEFAULT_SEED,
    workers: int = 2,
    speech: bool = True,
) -> Path:
    """Write the corpus under `output` (the module's description lists the files) and return the manifest's path.

    Existing images and audio files are kept, so that an interrupted run can be resumed and a corpus can grow.

    Args:
        output: The folder.
        samples: Number of scenes. Of 40 consecutive ones, 35 are for training.
        seed: Seed of everything random.
        workers: Number of processes. The files do not depend on it.
        speech: Whether the captions are spoken.

    Raises:
        UserError: A package is missing, the folder holds a corpus of another seed, or a caption cannot be spoken.
    """
    if speech:
        check_piper()
    with exclusive_use(output):
        return _write_corpus(output, samples, seed, workers, speech)


def _write_corpus(output: Path, samples: int, seed: int, workers: int, speech: bool) -> Path:
    for folder in ("images", "questions", *(["audio"] if speech else [])):
        (output / folder).mkdir(parents=True, exist_ok=True)
        for leftover in (output / folder).glob("*.tmp"):
            leftover.unlink()
    _check_key(output, seed)
    tasks = [_Task(number, scene, seed, output) for number, scene in enumerate(islice(scenes(seed), samples))]
    described = in_processes(_describe_and_draw, tasks, workers, "images")
    records = [record for record, _ in described]
    if speech:
        records = [
            replace(record, speech=choose_speech(seed, number, record.split)) for number, record in enumerate(records)
        ]
        speak_captions([_recording(output, record, seed) for record in records], output, workers)
    _write_text(output / TRUTH_FILE, "".join(truth_lines(records)))
    _write_questions(output / "questions", described)
    write_json(output / "attribution.json", ATTRIBUTION)
    manifest = output / "manifest.jsonl"
    write_manifest(manifest, [_manifest_line(record) for record in records])
    counts = Counter(record.split for record in records)
    _LOG.info(f"{manifest}: " + ", ".join(f"{counts[split]} {split}" for split in SPLITS))
    return manifest


def _check_key(output: Path, seed: int) -> None:
    """Write the key of the corpus. Raise UserError if the folder has files of another corpus."""
    path, key = output / _KEY_FILE, {"corpus": "scenes", "version": _VERSION, "seed": seed}
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != key:
            other = found.get("seed") if isinstance(found, dict) and found.get("version") == _VERSION else None
            what = "a corpus of another version" if other is None else f"a corpus of --seed {other}"
            raise UserError(f"{output}: it holds {what}: choose another folder")
    elif (output / "manifest.jsonl").exists():
        raise UserError(f"{output}: it holds another corpus: choose another folder")
    write_json(path, key)


def _describe_and_draw(task: _Task) -> tuple[SceneRecord, list[Question]]:
    """Return the record and the questions of a sample, and draw its image unless it exists."""
    number, graph = task.number, task.scene.graph
    name = _name(number)
    captions = different_captions(graph, Choices("captions", task.seed, number), CAPTIONS)
    _, mentioned, phrasing = captions[0]
    negatives = hard_negatives(graph, mentioned, phrasing, Choices("negatives", task.seed, number))
    record = SceneRecord(
        id=name,
        split=split_of(number),
        scene=task.scene,
        held_out=held_out(graph),
        captions=tuple(text for text, _, _ in captions),
        negatives={kind: text for kind, (_, text) in negatives.items()},
    )
    path = task.output / "images" / f"{name}.png"
    if not path.is_file():
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(png_bytes(task.scene))
        os.replace(temporary, path)
    return record, scene_questions(graph, Choices("questions", task.seed, number))


def _recording(output: Path, record: SceneRecord, seed: int) -> Recording:
    assert record.speech is not None, "speech was chosen"
    path = output / "audio" / f"{record.id}.flac"
    return Recording(record.captions[0], record.speech, path, seed, int(record.id))


def _manifest_line(record: SceneRecord) -> ManifestLine:
    return ManifestLine(
        id=record.id,
        image=f"images/{record.id}.png",
        text=record.captions[0],
        audio=f"audio/{record.id}.flac" if record.speech is not None else None,
        labels=tuple(scene_labels(record.scene.graph)),
        split=record.split,
    )


def _write_questions(folder: Path, described: list[tuple[SceneRecord, list[Question]]]) -> None:
    for split in SPLITS:
        asked = [(int(record.id), questions) for record, questions in described if record.split == split]
        if asked:
            for kind, content in zip(("questions", "annotations"), vqa_files(asked, split), strict=True):
                _write_json_line(folder / f"{split}_{kind}.json", content)


def _write_json_line(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _name(number: int) -> str:
    """Return a sample's id, which is also the name of its files: twelve digits, as VQA v2 names images."""
    return f"{number:012d}"
