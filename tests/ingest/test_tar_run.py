"""Stores prepared from tars in place: the bytes of loose files, also after a kill and after a truncated tar was completed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from opt_ds.decoding.tar_members import MemberReference, member_reference
from opt_ds.errors import UserError
from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.ingest.importers.webdataset import import_webdataset
from opt_ds.ingest.manifest import read_manifest
from opt_ds.ingest.report import REPORT_FILE
from opt_ds.ingest.retry import file_state
from opt_ds.store import FeatureStore
from tests.ingest.importers.tars import write_tar
from tests.ingest.test_pipeline import contents
from tests.logs import logged_lines

COLOURS, LOUDNESS = "tests.extending.extractor:Colours", "tests.extending.extractor:Loudness"
SETTINGS = PrepareSettings(images=COLOURS, speech=LOUDNESS, samples_per_shard=1, vocab_size=60)
NAMES = [f"{number:09d}" for number in range(6)]


def run(manifest: Path, output: Path, **options: object) -> list[str]:
    with logged_lines() as logged:
        prepare(manifest, output, SETTINGS, workers=1, device="cpu", **options)  # type: ignore[arg-type]
    return logged


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six samples as loose files, and the same ones in two shards."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        Image.fromarray(random.integers(9, 256, (20, 30, 3), "uint8")).save(folder / f"{name}.png")
        soundfile.write(folder / f"{name}.flac", 0.3 * random.standard_normal(4000), 16000)
        (folder / f"{name}.txt").write_text(f"some words, number {number}")
        (folder / f"{name}.json").write_text(json.dumps({"url": f"http://a.b/{name}"}))
    for shard in (0, 1):
        files = sorted(path for name in NAMES[3 * shard : 3 * shard + 3] for path in folder.glob(f"{name}.*"))
        write_tar(folder / f"{shard:05d}.tar", [(path.name, path.read_bytes()) for path in files])
    import_webdataset([f"train={folder}/{{00000..00001}}.tar"], folder / "manifest.jsonl")
    return folder


def loose_manifest(folder: Path) -> Path:
    """Write the manifest of the tars with the loose files instead."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        for kind in ("image", "audio"):
            reference = member_reference(line[kind])
            assert reference is not None
            line[kind] = reference.name
    (folder / "loose.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "loose.jsonl"


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.faults)])
def test_a_store_of_tars_is_that_of_loose_files_also_after_kills(kills: int, corpus: Path, tmp_path: Path) -> None:
    for shard in range(kills):
        kill_after_shard(shard, corpus / "manifest.jsonl", tmp_path / "store", tmp_path)
    run(corpus / "manifest.jsonl", tmp_path / "store")
    run(loose_manifest(corpus), tmp_path / "loose")
    assert_same(tmp_path / "store", tmp_path / "loose")


@pytest.mark.faults
def test_a_tar_that_was_truncated_is_completed_with_retry_skipped(corpus: Path, tmp_path: Path) -> None:
    manifest, output, tar = corpus / "manifest.jsonl", tmp_path / "store", corpus / "00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: last_image(manifest).offset + 600])
    run(manifest, output)
    (skipped,) = json.loads((output / REPORT_FILE).read_text())["skipped_samples"]
    assert skipped["reason"] == f"image file is broken: 00001.tar#{NAMES[-1]}.png: 00001.tar is truncated"
    assert not any("changed since" in line for line in run(manifest, output))
    tar.write_bytes(whole)
    assert any("1 skipped file has changed since" in line for line in run(manifest, output))
    run(manifest, output, retry_skipped=True)
    run(loose_manifest(corpus), tmp_path / "loose")
    assert_same(output, tmp_path / "loose")


def test_the_state_of_a_skipped_member_changes_with_its_content_and_its_tar(corpus: Path) -> None:
    """`--retry-skipped` looks at this."""
    manifest, tar = corpus / "manifest.jsonl", corpus / "00001.tar"
    whole, member = tar.read_bytes(), last_image(manifest)
    path = corpus / str(read_manifest(manifest).lines[-1].image)
    good = file_state(path)
    assert good == file_state(corpus / f"{NAMES[-1]}.png"), "that of the loose file"
    tar.write_bytes(whole + b"more")
    assert file_state(path) == good, "what follows the member is of no importance"
    states = [good]
    for content in (whole[: member.offset + 600], whole[: member.offset + 100], whole[: member.offset + 600] + b"\1" * 9999):
        tar.write_bytes(content)
        states.append(file_state(path))
    tar.unlink()
    states.append(file_state(path))
    assert all(states.count(state) == 1 for state in states) and states[-1] is None


def last_image(manifest: Path) -> MemberReference:
    reference = member_reference(str(read_manifest(manifest).lines[-1].image))
    assert reference is not None
    return reference


def assert_same(store: Path, loose: Path) -> None:
    ours, theirs = contents(store), contents(loose)
    assert sorted(ours) == sorted(theirs)
    assert {name for name in ours if ours[name] != theirs[name]} <= {"store.json"}, "it states the manifest's hash"
    assert FeatureStore(store).description.fingerprint == FeatureStore(loose).description.fingerprint
    assert FeatureStore(store).num_samples == 6


def kill_after_shard(shard: int, manifest: Path, output: Path, folder: Path) -> None:
    """Prepare in another process, and kill it as soon as this shard is complete."""
    script = folder / "run.py"
    script.write_text(
        "import sys; from pathlib import Path; from tests.ingest.test_tar_run import run\n"
        "if __name__ == '__main__':\n    run(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, script, manifest, output],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (output / f"shard-{shard:05d}.json").exists():
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (output / f"shard-{shard:05d}.json").exists() and not (output / "store.json").exists()


def test_tars_that_are_missing_or_elsewhere_are_refused(corpus: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifests" / "manifest.jsonl"
    import_webdataset([str(corpus / "00000.tar")], manifest)
    rejected = read_manifest(corpus / "manifest.jsonl", further=["touch"]).rejected
    assert rejected == []
    with pytest.raises(UserError, match="is outside the manifest's folder"):
        read_manifest(manifest)
    inside = 'x.tar#a/../../../etc/passwd@0+5'
    for number, name in enumerate((inside, f"../x.tar#{tmp_path}/a.png@0+5", f"/x.tar#/../../{tmp_path}/manifests/a.png@0+5")):
        manifest.write_text(json.dumps({"id": "a", "image": name}) + '\n{"id": "b", "text": "b"}')
        assert len(read_manifest(manifest).rejected) == (0 if number == 0 else 1), "the tar's own place decides"
    manifest.write_text('{"id": "a", "touch": "x.tar#a.csv@0+5"}\n{"id": "b", "text": "b"}')
    (one,) = read_manifest(manifest, further=["touch"]).rejected
    assert 'touch "x.tar#a.csv@0+5" is in a tar: only image and audio can be read there' in one.reason
    for path in corpus.glob("*.tar"):
        path.rename(path.with_suffix(".moved"))
    with pytest.raises(UserError, match=r"6 of 6 image files are missing, the first is .*corpus/00000.tar: paths"):
        run(corpus / "manifest.jsonl", tmp_path / "store")
    with pytest.raises(UserError, match="a tar, not a manifest: opt-ds import webdataset"):
        read_manifest((corpus / "00000.moved").rename(corpus / "00000.tar"))
