"""Test the emoji corpus: captions that can be spoken, concepts, splits without leaks, and synthesised speech."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from opt_ds.errors import UserError
from opt_ds.ingest.importers import emoji as corpus
from opt_ds.ingest.importers.emoji import EmojiSample, collect_samples, concept_of, spoken_caption, write_emoji_corpus


@pytest.fixture(scope="module")
def samples() -> list[EmojiSample]:
    return collect_samples()


@pytest.mark.parametrize(
    ("name", "identifier", "caption"),
    [
        (":man_cook_medium-dark_skin_tone:", "1F468-1F3FE-200D-1F373", "man cook medium dark skin tone"),
        (":St._Lucia:", "1F1F1-1F1E8", "flag of Saint Lucia"),
        (":Antigua_&_Barbuda:", "1F1E6-1F1EC", "flag of Antigua and Barbuda"),
        (":keycap_*:", "002A-20E3", "keycap asterisk"),
        (":man’s_shoe:", "1F45E", "man's shoe"),
    ],
)
def test_captions_are_words_as_spoken(name: str, identifier: str, caption: str) -> None:
    assert spoken_caption(name, identifier) == caption


def test_variants_share_a_concept() -> None:
    cook = concept_of("1F9D1-200D-1F373")
    assert concept_of("1F468-1F3FE-200D-1F373") == concept_of("1F469-200D-1F373") == cook
    assert concept_of("1F46B-1F3FB") == concept_of("1F468-1F3FB-200D-1F91D-200D-1F468-1F3FF")
    assert concept_of("1F91D-1F3FB") == concept_of("1FAF1-1F3FB-200D-1FAF2-1F3FF") != concept_of("1F46B")
    assert concept_of("1F3C3-200D-27A1") != concept_of("1F3C3")
    assert concept_of("2640") == "2640"


def test_splits_hold_out_what_they_promise(samples: list[EmojiSample]) -> None:
    counts = Counter(sample.split for sample in samples)
    assert counts == {"train": 3247, "test_variant": 419, "test_concept": 167, "valid": 111}
    assert len({sample.id for sample in samples}) == len({sample.caption for sample in samples}) == len(samples)
    splits_of, images = defaultdict(Counter), defaultdict(set)
    for sample in samples:
        splits_of[sample.concept][sample.split] += 1
        images[sample.svg_sha256].add(sample.split)
        assert all(len(label) > 1 for label in sample.labels)
    for concept, splits in splits_of.items():
        if splits["test_concept"]:
            assert set(splits) == {"test_concept"}, concept
        else:
            assert 2 * splits["train"] >= sum(splits.values()), concept
    assert all(len(splits) == 1 for splits in images.values())
    assert sum(not sample.labels for sample in samples) < 20


def test_identical_images_are_one_concept(samples: list[EmojiSample]) -> None:
    concepts = defaultdict(set)
    for sample in samples:
        concepts[sample.svg_sha256].add(sample.concept)
    assert all(len(names) == 1 for names in concepts.values())
    assert len(concepts) < len(samples) - 150


def test_the_corpus_is_spoken_once_the_same_each_time_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: list[EmojiSample]
) -> None:
    chosen = [next(sample for sample in samples if sample.split == split) for split in corpus.LENGTH_SCALES]
    monkeypatch.setattr(corpus, "collect_samples", lambda: chosen)
    manifest = write_emoji_corpus(tmp_path / "one", workers=2)
    write_emoji_corpus(tmp_path / "two", workers=1)
    first, second = (
        {f.name: f.read_bytes() for f in (tmp_path / name).rglob("*.*") if f.is_file()} for name in ("one", "two")
    )
    assert first == second
    assert len(first) == 4 + 4 + 2
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [line["split"] for line in lines] == list(corpus.LENGTH_SCALES)
    for line in lines:
        waveform, rate_hz = soundfile.read(tmp_path / "one" / line["audio"])
        assert rate_hz == 16000
        assert 0.5 < len(waveform) / rate_hz < 6
        assert np.sqrt(np.square(waveform).mean()) > 0.02
        assert (tmp_path / "one" / line["image"]).is_file()
    victim = tmp_path / "one" / lines[0]["audio"]
    kept = tmp_path / "one" / lines[1]["audio"]
    stamp = kept.stat().st_mtime_ns
    victim.unlink()
    write_emoji_corpus(tmp_path / "one", workers=1)
    assert victim.read_bytes() == second[victim.name]
    assert kept.stat().st_mtime_ns == stamp


def test_the_corpus_is_spoken_without_what_takes_long_to_install(tmp_path: Path) -> None:
    """The Makefile has it spoken while torch is on its way."""
    missing = "for name in ('torch', 'torchvision', 'torchaudio', 'deepspeed', 'transformers'): sys.modules[name] = None"
    code = f"import sys\n{missing}\nfrom opt_ds.cli import main\nmain()"
    subprocess.run([sys.executable, "-c", code, "corpus", "emoji", "--output", str(tmp_path), "--limit", "2"], check=True)
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 2


def test_a_folder_of_the_other_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "truth.jsonl").touch()
    with pytest.raises(UserError, match="it holds the corpus scenes: choose another folder"):
        write_emoji_corpus(tmp_path, limit=1)
    assert [file.name for file in tmp_path.iterdir()] == ["truth.jsonl"]


def test_the_test_splits_are_spoken_slower(tmp_path: Path) -> None:
    from opt_ds.ingest.importers.speech_synthesis import SpeechJob, speak_all

    paths = [tmp_path / "normal.flac", tmp_path / "slow.flac"]
    assert (
        speak_all([SpeechJob("love letter", scale, path) for scale, path in zip((1.0, 1.15), paths, strict=True)], 1)
        == {}
    )
    normal, slow = (soundfile.info(path).duration for path in paths)
    assert 1.05 < slow / normal < 1.25
