"""Test the speech tools: equal jobs produce equal files whatever was spoken before, and failures have a reason."""

from pathlib import Path

import soundfile

from opt_ds.ingest.importers.speech_synthesis import ESPEAK, SpeechJob, speak_all


def test_espeak_speaks_the_same_after_other_captions(tmp_path: Path) -> None:
    """Its library keeps state between utterances, and seeds its noise, which this voice has, with the time."""
    alone, after = tmp_path / "alone.flac", tmp_path / "after.flac"
    longer = SpeechJob("two small dogs above a house", 1.0, tmp_path / "longer.flac", "en-us")
    assert speak_all([SpeechJob("a red cat", 1.0, alone, "en-us+f2")], 1, ESPEAK) == {}
    assert speak_all([longer, SpeechJob("a red cat", 1.0, after, "en-us+f2")], 1, ESPEAK) == {}
    assert alone.read_bytes() == after.read_bytes()


def test_espeak_has_voices_and_rates(tmp_path: Path) -> None:
    jobs = {
        name: SpeechJob("a red cat", scale, tmp_path / f"{name}.flac", voice)
        for name, voice, scale in (("one", "en-us", 1.0), ("slow", "en-us", 1.3), ("other", "en-us+f2", 1.0))
    }
    assert speak_all(list(jobs.values()), 1, ESPEAK) == {}
    assert all(soundfile.info(job.path).samplerate == 16_000 for job in jobs.values())
    normal, slow = (soundfile.info(jobs[name].path).duration for name in ("one", "slow"))
    assert 1.15 < slow / normal < 1.45
    assert jobs["one"].path.read_bytes() != jobs["other"].path.read_bytes()


def test_a_voice_that_is_not_there_is_the_reason(tmp_path: Path) -> None:
    wrong, right = tmp_path / "wrong.flac", tmp_path / "right.flac"
    jobs = [SpeechJob("a red cat", 1.0, wrong, "en-moon"), SpeechJob("a cat", 1.0, right, "en-us")]
    assert speak_all(jobs, 1, ESPEAK) == {wrong: "no voice en-moon"}
    assert right.is_file() and not wrong.exists()
