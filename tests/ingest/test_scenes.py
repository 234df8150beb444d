"""Test the corpus of scenes: the same bytes on every run, resumable, spoken by several voices, one of them held out."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import soundfile

from opt_ds.errors import UserError
from opt_ds.ingest.importers import processes
from opt_ds.ingest.importers.scene_speech import (
    HELD_OUT_LENGTH_SCALE,
    HELD_OUT_VOICE,
    LENGTH_SCALES,
    PIPER_VOICE,
    VOICES,
    choose_speech,
    speech_pieces,
)
from opt_ds.ingest.importers.scenes import write_scenes_corpus
from opt_ds.ingest.manifest import read_manifest
from opt_ds.scenes.captions import different_captions
from opt_ds.scenes.judging import caption_is_true
from opt_ds.scenes.random_choices import Choices
from opt_ds.scenes.records import read_truth
from opt_ds.scenes.sampling import SPLITS, VOICE, scenes, split_of


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoken") / "corpus"
    write_scenes_corpus(folder, samples=6, workers=1)
    return folder


def test_a_manifest_that_prepare_reads(spoken: Path) -> None:
    manifest = read_manifest(spoken / "manifest.jsonl", strict=True)
    truth = read_truth(spoken / "truth.jsonl")
    assert list(truth) == [line.id for line in manifest.lines] and len(truth) == 6
    assert set(manifest.splits) == set(SPLITS)
    for line in manifest.lines:
        record = truth[line.id]
        assert line.text == record.captions[0] and line.split == record.split
        assert all(caption_is_true(text, record.scene.graph) for text in record.captions)
        assert not any(caption_is_true(text, record.scene.graph) for text in record.negatives.values())
        assert (spoken / str(line.image)).is_file()
        assert record.scene.graph.groups[0].kind in line.labels


def test_captions_are_spoken(spoken: Path) -> None:
    records = read_truth(spoken / "truth.jsonl").values()
    assert {record.speech.joined for record in records if record.speech} == {True, False}
    for record in records:
        samples, rate_hz = soundfile.read(spoken / "audio" / f"{record.id}.flac")
        words = len(record.captions[0].split())
        assert rate_hz == 16_000 and samples.ndim == 1
        assert 0.12 * words < len(samples) / rate_hz < 0.7 * words
        assert 0.01 < (samples**2).mean() ** 0.5 < 0.4
    assert not (spoken / "pieces").exists()


def test_a_stopped_run_resumes_to_the_same_bytes_with_other_workers(spoken: Path, tmp_path: Path) -> None:
    shutil.copytree(spoken, tmp_path, dirs_exist_ok=True)
    for name in ("audio/000000000001.flac", "audio/000000000005.flac", "images/000000000002.png", "manifest.jsonl"):
        (tmp_path / name).unlink()
    (tmp_path / "images" / "000000000003.png.77.tmp").write_text("of a killed process")
    kept = tmp_path / "audio" / "000000000000.flac"
    stamp = kept.stat().st_mtime_ns
    write_scenes_corpus(tmp_path, samples=6, workers=2)
    assert contents(tmp_path) == contents(spoken)
    assert kept.stat().st_mtime_ns == stamp


def test_worker_processes_and_growth_do_not_change_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scenes_corpus(tmp_path / "one", samples=70, workers=1, speech=False)
    write_scenes_corpus(tmp_path / "two", samples=30, speech=False)
    monkeypatch.setattr(processes, "_FEW", 0)
    write_scenes_corpus(tmp_path / "two", samples=70, workers=2, speech=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert all(line.audio is None for line in read_manifest(tmp_path / "one" / "manifest.jsonl").lines)


def test_another_seed_needs_another_folder(tmp_path: Path) -> None:
    write_scenes_corpus(tmp_path / "one", samples=3, speech=False)
    with pytest.raises(UserError, match="--seed 1: choose another folder"):
        write_scenes_corpus(tmp_path / "one", samples=3, seed=2, speech=False)
    write_scenes_corpus(tmp_path / "two", samples=3, seed=2, speech=False)
    assert (
        contents(tmp_path / "one")["images/000000000000.png"] != contents(tmp_path / "two")["images/000000000000.png"]
    )
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "manifest.jsonl").write_text('{"id": "a", "text": "b"}\n')
    with pytest.raises(UserError, match="another corpus"):
        write_scenes_corpus(tmp_path / "emoji", samples=3, speech=False)


def test_a_voice_and_a_rate_are_held_out() -> None:
    chosen = [(split_of(number), choose_speech(1, number, split_of(number))) for number in range(8000)]
    trained = Counter((speech.voice, speech.length_scale) for split, speech in chosen if split != VOICE)
    assert set(trained) == {(voice, scale) for voice in VOICES for scale in LENGTH_SCALES}
    tested = Counter(
        (speech.voice == HELD_OUT_VOICE, speech.length_scale == HELD_OUT_LENGTH_SCALE)
        for split, speech in chosen
        if split == VOICE
    )
    assert set(tested) == {(True, False), (False, True), (True, True)} and min(tested.values()) > 40
    assert all(speech.voice == PIPER_VOICE for _, speech in chosen if speech.joined)
    joined = [speech.joined for split, speech in chosen if speech.voice == PIPER_VOICE]
    assert 0.98 < sum(joined) / len(joined) < 1


def test_pieces_are_phrases_and_few(spoken: Path) -> None:
    assert speech_pieces("there is a small red cat to the left of an orange on a green background") == [
        "there is", "a small", "red", "cat", "to the left of", "an orange", "on a green background",
    ]  # fmt: skip
    pieces = set()
    for number, scene in zip(range(1500), scenes(1), strict=False):
        for text, _, _ in different_captions(scene.graph, Choices(number), 2):
            assert " ".join(speech_pieces(text)) == text
            pieces |= set(speech_pieces(text))
    assert len(pieces) < 450


def test_it_needs_nothing_that_takes_long_to_install(tmp_path: Path) -> None:
    missing = (
        "for name in ('torch', 'torchvision', 'torchaudio', 'deepspeed', 'transformers'): sys.modules[name] = None"
    )
    code = f"import sys\n{missing}\nfrom opt_ds.cli import main\nmain()"
    options = ["corpus", "scenes", "--output", str(tmp_path), "--samples", "6", "--no-speech"]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "2 train, 1 valid, 1 test_composition, 1 test_voice, 1 test_style" in done.stdout + done.stderr
    lines = (tmp_path / "questions" / "train_questions.json").read_text()
    assert json.loads(lines)["data_subtype"] == "train"
