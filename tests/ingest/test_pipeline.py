"""Manifest -> store: what is good is kept, what is broken is reported, and the bytes do not depend on how it ran."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_ds.errors import UserError
from opt_ds.features.grid import GridExtractor
from opt_ds.features.text import train_wordpiece
from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.ingest.report import REPORT_FILE
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.files import exclusive_use
from tests.decoded import image_of
from tests.ingest.conftest import SETTINGS


@pytest.fixture
def prepared(messy_store: Path) -> Path:
    return messy_store


def contents(store: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(store)): file.read_bytes()
        for file in store.rglob("*")
        if file.is_file()
    }


def test_good_samples_are_kept_and_the_store_passes_inspection(prepared: Path) -> None:
    store = FeatureStore(prepared)
    assert inspect_store(prepared).failures == []
    index = {store.sample_id(number): number for number in range(store.num_samples)}
    assert sorted(index) == [f"ok-{number}" for number in range(1, 8)]
    rows = {name: store.rows[number].tolist() for name, number in index.items()}
    assert rows["ok-1"][1] == rows["ok-3"][1]  # one image, one row
    assert rows["ok-4"][:2] == [-1, -1]
    assert rows["ok-5"][::2] == [-1, -1]
    assert store.groups[index["ok-1"]] == store.groups[index["ok-3"]] != store.groups[index["ok-2"]]
    assert store.labels(index["ok-1"]) == ["b", "a"]
    assert store.caption(rows["ok-2"][0]) == "naïve café 猫"
    assert store.tokenizer().decode(store.text(rows["ok-1"][0])) == "a red thing"
    assert store.frame_counts[rows["ok-1"][2]] == 151  # 12,000 samples at 8 kHz, 100 frames per second
    assert store.split_samples("valid").tolist() == [index["ok-6"]]
    assert store.pixels(rows["ok-5"][1])[:, 28, 28].tolist() == [0, 0, 255]
    assert store.description.extractors["image"]["backbone"] == "efficientnet-lite0"


def test_what_is_broken_is_counted_with_its_reason(prepared: Path) -> None:
    report = json.loads((prepared / REPORT_FILE).read_text())
    assert (report["kept"], report["skipped"]) == (7, 5)
    reasons = {entry["id"]: entry["reason"] for entry in report["skipped_samples"]}
    assert reasons["bad-image"].startswith("image file is broken: cut.jpg")
    assert reasons["no-image"] == "image file is missing: gone.png"
    assert reasons["bad-audio"].startswith("audio file is broken: noise.wav")
    assert reasons["no-audio"] == "audio file is missing: gone.wav"
    assert reasons["empty"] == "the text has no tokens"


def test_stored_features_are_the_extractors(prepared: Path, messy_manifest: Path) -> None:
    store = FeatureStore(prepared)
    sample = next(number for number in range(store.num_samples) if store.sample_id(number) == "ok-6")
    (regions,) = GridExtractor().extract([image_of(messy_manifest.parent / "grey.png")])
    stored = store.regions(store.rows[sample, 1])
    assert np.abs(stored.features.astype(float) - regions.features).max() < 0.01
    assert (stored.boxes == regions.boxes).all()


def test_bytes_do_not_depend_on_workers_or_on_being_killed(
    prepared: Path, messy_manifest: Path, tmp_path: Path
) -> None:
    """A first process is killed as soon as a shard is complete. A second one finishes the work."""
    program = (
        "import sys; from pathlib import Path; from opt_ds.ingest import PrepareSettings, prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare(Path(sys.argv[1]), Path(sys.argv[2]), PrepareSettings(samples_per_shard=3, vocab_size=80),"
        " workers=1, device='cpu')"
    )
    script, output = tmp_path / "run.py", tmp_path / "store"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, script, messy_manifest, output],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (output / "shard-00000.json").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "store.json").exists()
    whole = (output / "shard-00000.h5").stat().st_mtime_ns
    with pytest.raises(UserError, match="unfinished store of other inputs"):
        other = PrepareSettings(samples_per_shard=3, vocab_size=70)
        prepare(messy_manifest, output, other, workers=1, device="cpu")
    prepare(messy_manifest, output, SETTINGS, workers=1, device="cpu")
    assert (output / "shard-00000.h5").stat().st_mtime_ns == whole
    ours, theirs = contents(output), contents(prepared)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.py", "store"]


def test_a_finished_store_of_the_same_inputs_is_returned_another_is_refused(
    prepared: Path, messy_manifest: Path, logged: list[str]
) -> None:
    before = contents(prepared)
    prepare(messy_manifest, prepared, SETTINGS, device="cpu")
    assert "already prepared" in logged[-1]
    with pytest.raises(UserError, match="another finished feature store is there"):
        prepare(messy_manifest, prepared, SETTINGS, device="cpu", limit=3)
    assert contents(prepared) == before


def test_strict_and_hopeless_runs_stop_with_one_line(messy_manifest: Path, tmp_path: Path) -> None:
    quiet = {"device": "cpu", "workers": 1}
    with pytest.raises(UserError, match=r"1 of 7 image files are missing, the first is .*gone.png"):
        prepare(messy_manifest, tmp_path / "s", strict=True, **quiet)
    cut = tmp_path / "cut.jsonl"
    cut.write_text(json.dumps({"id": "x", "image": str(messy_manifest.parent / "cut.jpg")}))
    with pytest.raises(UserError, match=r'sample "x": image file is broken: cut.jpg.*--strict'):
        prepare(cut, tmp_path / "t", PrepareSettings(vocab_size=9), strict=True, allow_outside=True, **quiet)
    for settings, message in (
        (PrepareSettings(images="gird"), "did you mean"),
        (PrepareSettings(speech="wav2vec2"), "it needs a checkpoint"),
        (PrepareSettings(text=tmp_path / "none"), "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(messy_manifest, tmp_path / "u", settings, **quiet)
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pool_frames": 0}, "pool_frames: must be at least 1 (found 0)"),
        ({"max_seconds": 0}, "max_seconds: must be more than 0 (found 0)"),
        ({"max_seconds": math.inf}, "max_seconds: must be a finite number (found inf)"),
        ({"max_frame": 3}, 'unknown key "max_frame" (did you mean "max_frames"?)'),
        ({"unicode_form": "nfkc"}, '--unicode-form "nfkc": unknown: choose NFC, NFKC, NFD, NFKD, none'),
        ({"speech_overlap_s": 15.0}, "--speech-overlap 15: must be less than half of --speech-window 30"),
        ({"compression": "lzf"}, "compression: choose 'gzip' (found 'lzf')"),
    ],
)
def test_a_bad_setting_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        PrepareSettings(**values)
    assert str(error.value) == f"preparation settings: {message}"


def test_a_tokenizer_is_never_trained_on_no_text(tmp_path: Path, logged: list[str]) -> None:
    """Else every caption would become [UNK]."""
    manifest = tmp_path / "m.jsonl"
    lines = [{"id": name, "text": "hello world", "split": "training"} for name in "ab"]
    manifest.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r'no text is in split "train".* give a tokenizer with --text'):
        prepare(manifest, tmp_path / "s", PrepareSettings(images="npz"), workers=1, device="cpu")
    assert not (tmp_path / "s").exists()
    assert any('no sample is in split "train"' in line for line in logged)


def test_nothing_of_a_stopped_runs_tokenizer_gets_into_the_next(tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"id": "a", "text": "hello world", "split": "train"}))
    train_wordpiece(["hello world"], 40, tmp_path / "given")
    (tmp_path / "given" / "vocab.txt").unlink()
    (tmp_path / ".s.tokenizer").mkdir()
    (tmp_path / ".s.tokenizer" / "vocab.txt").write_text("another")
    settings = PrepareSettings(images="npz", text=tmp_path / "given")
    prepare(manifest, tmp_path / "s", settings, workers=1, device="cpu")
    assert sorted(file.name for file in (tmp_path / "s" / "tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_frames_are_pooled_then_cut(messy_manifest: Path, prepared: Path, tmp_path: Path) -> None:
    only = tmp_path / "one.jsonl"
    only.write_text(
        json.dumps({"id": "x", "text": "a a", "audio": str(messy_manifest.parent / "mono.wav"), "split": "train"})
    )
    settings = PrepareSettings(pool_frames=4, max_frames=30, vocab_size=9)
    description = prepare(only, tmp_path / "s", settings, workers=1, device="cpu", allow_outside=True)
    assert description.dims.audio_frame_rate_hz == 25
    plain = FeatureStore(prepared)
    row = next(plain.rows[number, 2] for number in range(plain.num_samples) if plain.sample_id(number) == "ok-1")
    frames = FeatureStore(tmp_path / "s").frames(0)
    assert frames.shape == (30, 80)
    assert np.allclose(frames[3], plain.frames(row)[12:16].astype(float).mean(0), atol=0.01)


def test_a_second_process_waits_for_the_first(tmp_path: Path, logged: list[str]) -> None:
    order: list[str] = []
    entered = threading.Event()

    def second() -> None:
        with exclusive_use(tmp_path / "s"):
            order.append("second")

    with exclusive_use(tmp_path / "s"):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert len(logged) == 1
    assert "another process is writing it" in logged[0]
    assert list(tmp_path.iterdir()) == []
