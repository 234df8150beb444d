"""Speech of the corpus `scenes`: who speaks a caption, how fast, and how it is made.

Piper sounds natural but is slow. Most of its captions are joined from recordings of words and phrases, each made once
per rate; some are spoken as a whole. eSpeak NG, a part of the same package, is fast and speaks every caption as a
whole.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import soundfile

from opt_ds.errors import UserError
from opt_ds.ingest.importers.processes import in_processes
from opt_ds.ingest.importers.speech_synthesis import ESPEAK, PIPER, SpeechJob, speak_all
from opt_ds.scenes.phrases import (
    COUNT_WORDS,
    COUNTED_FRAMES,
    FRAMES,
    GROUND_ENDS,
    GROUND_STARTS,
    PLACES,
    RELATIONS,
    WITH_PLACES,
)
from opt_ds.scenes.random_choices import Choices, stable_hash
from opt_ds.scenes.records import Speech
from opt_ds.scenes.sampling import VOICE
from opt_ds.scenes.vocabulary import GROUND_WORDS

SAMPLE_RATE_HZ = 16_000
PIPER_VOICE = "joe"
#: Voice -> its share of the captions. All but Piper's are names of eSpeak NG.
VOICES = {PIPER_VOICE: 0.7, "en-us": 0.1, "en-us+f2": 0.1, "en-us+m1": 0.1}
LENGTH_SCALES = (0.9, 1.0, 1.15)
#: What only `test_voice` has. A third of it has the voice, a third the rate, and a third both.
HELD_OUT_VOICE, HELD_OUT_LENGTH_SCALE = "en-us+f1", 1.3

_WHOLE_SHARE = 0.01  # of Piper's captions: spoken as a whole
_SILENCE = 0.01  # relative to the largest value of a piece: what is below at both ends is cut off
_KEPT_S = 0.01  # of the silence at both ends of a piece
_PAUSES_S = (0.0, 0.05)  # between pieces
_GAINS = (0.6, 1.0)
_PIECES = "pieces"
_LONGEST_UNIT = 6  # words


@dataclass(frozen=True)
class Recording:
    """A caption to be spoken into a file. `number` of the sample and `seed` determine the pauses and the loudness."""

    text: str
    speech: Speech
    path: Path
    seed: int
    number: int


def choose_speech(seed: int, number: int, split: str) -> Speech:
    """Return how the caption of a sample is spoken."""
    choices = Choices("speech", seed, number)
    voice, scale = choices.weighted(VOICES), choices.one_of(LENGTH_SCALES)
    if split == VOICE:
        new = choices.below(3)
        voice = voice if new == 1 else HELD_OUT_VOICE
        scale = scale if new == 0 else HELD_OUT_LENGTH_SCALE
    joined = voice == PIPER_VOICE and not choices.chance(_WHOLE_SHARE)
    return Speech(voice, scale, joined)


def speech_pieces(text: str) -> list[str]:
    """Return the words and phrases whose recordings are joined. An article stays with the next word."""
    words, pieces, place = text.split(), [], 0
    while place < len(words):
        length = next(
            (count for count in range(_LONGEST_UNIT, 1, -1) if " ".join(words[place : place + count]) in _units()),
            2 if words[place] in ("a", "an") else 1,
        )
        pieces.append(" ".join(words[place : place + length]))
        place += length
    return pieces


def speak_captions(recordings: Sequence[Recording], folder: Path, workers: int) -> None:
    """Write the recordings whose file does not exist yet, 16 kHz FLAC.

    Pieces are kept in `folder` until all are written.

    Raises:
        UserError: A caption cannot be spoken.
    """
    todo = [recording for recording in recordings if not recording.path.is_file()]
    if not todo:
        return
    pieces = folder / _PIECES
    pieces.mkdir(exist_ok=True)
    joined = [recording for recording in todo if recording.speech.joined]
    needed = {(piece, each.speech.length_scale) for each in joined for piece in speech_pieces(each.text)}
    jobs = [SpeechJob(text, scale, _piece_file(pieces, text, scale)) for text, scale in sorted(needed)]
    whole = [(each, _job(each)) for each in todo if not each.speech.joined]
    _speak([*jobs, *(job for each, job in whole if each.speech.voice == PIPER_VOICE)], workers, PIPER)
    _speak([job for each, job in whole if each.speech.voice != PIPER_VOICE], workers, ESPEAK)
    in_processes(_join, [(each, pieces) for each in joined], workers, "joined")
    shutil.rmtree(pieces)


def _job(recording: Recording) -> SpeechJob:
    speech = recording.speech
    voice = "" if speech.voice == PIPER_VOICE else speech.voice
    return SpeechJob(recording.text, speech.length_scale, recording.path, voice)


def _speak(jobs: list[SpeechJob], workers: int, engine: str) -> None:
    failures = speak_all(jobs, workers, engine)
    if failures:
        path, reason = next(iter(failures.items()))
        raise UserError(f"{path}: {engine} could not speak it ({reason}); {len(failures)} such captions")


def _join(task: tuple[Recording, Path]) -> None:
    """Join the pieces of a recording, with short pauses, into its file, atomically."""
    recording, pieces = task
    choices = Choices("joined", recording.seed, recording.number)
    parts: list[np.ndarray] = []
    for text in speech_pieces(recording.text):
        parts.append(_piece(_piece_file(pieces, text, recording.speech.length_scale)))
        parts.append(np.zeros(round(choices.between(*_PAUSES_S) * SAMPLE_RATE_HZ), np.float32))
    samples = np.concatenate(parts[:-1]) * np.float32(choices.between(*_GAINS))
    temporary = recording.path.with_name(f"{recording.path.name}.{os.getpid()}.tmp")
    soundfile.write(temporary, samples, SAMPLE_RATE_HZ, subtype="PCM_16", format="FLAC")
    os.replace(temporary, recording.path)


@lru_cache(maxsize=4096)
def _piece(path: Path) -> np.ndarray:
    """Return the samples of a piece, float32, without the silence at its ends."""
    samples, _ = soundfile.read(path, dtype="float32")
    loud = np.flatnonzero(np.abs(samples) > _SILENCE * np.abs(samples).max())
    kept = round(_KEPT_S * SAMPLE_RATE_HZ)
    return samples[max(0, loud[0] - kept) : loud[-1] + 1 + kept]


def _piece_file(folder: Path, text: str, length_scale: float) -> Path:
    return folder / f"{text.replace(' ', '_')}-{length_scale}-{stable_hash(text) & 0xFFFF:04x}.flac"


@cache
def _units() -> frozenset[str]:
    """Return the phrases that are spoken in one piece."""
    phrases = chain(
        FRAMES,
        (f"{frame} {verb}" for frame in COUNTED_FRAMES for verb in ("is", "are")),
        PLACES.values(),
        *RELATIONS.values(),
        *WITH_PLACES.values(),
        *COUNT_WORDS.values(),
        (
            form.format(word)
            for form in (*GROUND_STARTS, *GROUND_ENDS)
            for words in GROUND_WORDS.values()
            for word in words
        ),
    )
    return frozenset(phrase for phrase in phrases if " " in phrase)
