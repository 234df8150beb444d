"""One modality of a finished store replaced, the others untouched; UNITER's files taken in."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from opt_ds.errors import UserError
from opt_ds.features.npz_regions import NpzExtractor
from opt_ds.ingest import PrepareSettings, update
from opt_ds.ingest.file_features import FileFeatures
from opt_ds.ingest.importers.uniter import export_lmdb, is_lmdb
from opt_ds.ingest.report import REPORT_FILE
from opt_ds.ingest.update import update_modality
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.store.update import set_codes
from tests.ingest.conftest import SETTINGS


def uniter_arrays(seed: int, count: int = 30, dim: int = 2048) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    corners = np.sort(random.random((count, 2, 2), "float32"), axis=1)
    sizes = corners[:, 1] - corners[:, 0]
    return {
        "features": random.standard_normal((count, dim)).astype("float16"),
        "norm_bb": np.concatenate([corners.reshape(count, 4), sizes], 1).astype("float16"),
        "conf": np.sort(random.random(count).astype("float16"))[::-1],
        "soft_labels": random.random((count, 1601)).astype("float16"),
    }


def test_audio_and_images_are_replaced_and_the_rest_is_kept(
    messy_manifest: Path, own_store: Path, tmp_path: Path, logged: list[str]
) -> None:
    """Frames pooled by four; then regions from UNITER's files."""
    path = own_store
    before = FeatureStore(path)
    frames, caption = before.frames(0), before.caption(0)  # opens the shard, whose file the update removes
    codes = np.zeros((len(before.region_counts), 64), "uint16")
    set_codes(path, codes, {"name": "dvae", "num_codes": 8})
    pooled = PrepareSettings(pool_frames=4)
    update_modality(path, messy_manifest, "audio", pooled, workers=1, device="cpu")
    after = FeatureStore(path)
    assert inspect_store(path).failures == []
    assert after.description.dims.audio_frame_rate_hz == 25
    assert after.has_codes
    assert np.array_equal(after.rows, before.rows)
    assert (after.frame_counts == -(-before.frame_counts // 4)).all()
    assert np.allclose(after.frames(0)[3], frames[12:16].astype("float32").mean(0), atol=0.01)
    assert after.caption(0) == caption
    report = json.loads((path / REPORT_FILE).read_text())
    assert report["lengths"]["audio"]["max"] == after.frame_counts.max()
    assert report["dropped"] == {"audio": []}

    named = []
    for line in map(json.loads, messy_manifest.read_text(encoding="utf-8").splitlines()):
        if line["id"].startswith("ok") and "image" in line and line["id"] != "ok-5":
            np.savez(tmp_path / f"{line['id']}.npz", **uniter_arrays(len(named)))
            line["image"] = f"{line['id']}.npz"
        named.append(line)
    manifest = tmp_path / "npz.jsonl"
    manifest.write_text("\n".join(map(json.dumps, named)), encoding="utf-8")
    with pytest.raises(UserError, match='sample "ok-5" would have no modality left'):
        update_modality(path, manifest, "image", PrepareSettings(images="npz"), workers=1, device="cpu")
    assert FeatureStore(path).fingerprint == after.fingerprint
    np.savez(tmp_path / "drawn.svg.npz", **uniter_arrays(99))
    manifest.write_text(manifest.read_text(encoding="utf-8").replace("drawn.svg", "drawn.svg.npz"), encoding="utf-8")
    update_modality(path, manifest, "image", PrepareSettings(images="npz"), workers=1, device="cpu")
    last = FeatureStore(path)
    assert inspect_store(path).failures == []
    assert not last.has_codes
    assert not last.has_pixels
    assert any("opt-ds train-dvae" in line for line in logged)
    sample = next(index for index in range(last.num_samples) if last.sample_id(index) == "ok-1")
    regions = last.regions(last.rows[sample, 1])
    arrays = uniter_arrays(0)
    kept = max(10, int((arrays["conf"] > 0.2).sum()))
    assert np.array_equal(regions.features, arrays["features"][:kept])
    assert np.array_equal(regions.labels, arrays["soft_labels"].argmax(1)[:kept])
    assert np.allclose(regions.boxes[:, :6], arrays["norm_bb"][:kept], atol=2e-3)
    assert np.array_equal(last.frames(0), after.frames(0))


def test_uniter_databases_become_files(tmp_path: Path) -> None:
    import lmdb
    import msgpack

    def packed(array: np.ndarray) -> dict[bytes, object]:  # as msgpack_numpy writes an array
        return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}

    arrays, buffer = uniter_arrays(1), io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 26) as environment, environment.begin(write=True) as writing:
        writing.put(b"coco_val_000000000139.npz", buffer.getvalue())
        plain = {name: packed(np.ascontiguousarray(array)) for name, array in arrays.items()}
        writing.put(b"coco_val_000000000285.npz", msgpack.packb(plain, use_bin_type=True))
        writing.put(b"__keys__", b"[]")
    assert is_lmdb(tmp_path / "db")
    assert export_lmdb(tmp_path / "db", tmp_path / "out") == 2
    names = ["coco_val_000000000139.npz", "coco_val_000000000285.npz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    ours, theirs = NpzExtractor().extract([tmp_path / "out" / name for name in names])
    assert np.array_equal(ours.features, theirs.features)
    assert np.array_equal(ours.boxes, theirs.boxes)
    np.savez(tmp_path / "odd.npz", features=np.zeros((3, 5)), norm_bb=np.zeros((3, 6)), conf=np.zeros(3))
    with pytest.raises(ValueError, match=r"features of shape \[3, 5\], not \[R, 2048\]"):
        NpzExtractor().extract([tmp_path / "odd.npz"])
    with lmdb.open(str(tmp_path / "bad"), map_size=1 << 20) as environment, environment.begin(write=True) as writing:
        writing.put(b"a.npz", b"nonsense")
    with pytest.raises(UserError, match="neither NPZ nor msgpack"):
        export_lmdb(tmp_path / "bad", tmp_path / "out")
    bomb = io.BytesIO()
    np.savez_compressed(bomb, features=np.zeros((70_000, 2048), "float16"))  # 274 MiB in 300 kB
    with lmdb.open(str(tmp_path / "bomb"), map_size=1 << 22) as environment, environment.begin(write=True) as writing:
        writing.put(b"a.npz", bomb.getvalue())
    with pytest.raises(UserError, match="its arrays take 273 MiB, 256 are allowed"):
        export_lmdb(tmp_path / "bomb", tmp_path / "out")


def test_uniter_keys_that_differ_by_folder_or_ending_alone_get_files_of_their_own(tmp_path: Path, logged: list[str]) -> None:
    import lmdb

    keys = ["a/1.jpg", "b/1.jpg", "1.png", "b/2.jpg", "3.tar.gz", "3.tar.bz2", "a%2F1.jpg.npz", "c/" + "n" * 300, "\0"]
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 24) as environment, environment.begin(write=True) as writing:
        for key in keys:
            buffer = io.BytesIO()
            np.savez(buffer, features=np.frombuffer(key.encode(), "uint8"))
            writing.put(key.encode(), buffer.getvalue())
        writing.put(b"\xff", b"x")
        writing.put(b"bad", b"nonsense")
    assert export_lmdb(tmp_path / "db", tmp_path / "out") == len(keys)
    held = {}
    for path in (tmp_path / "out").iterdir():
        with np.load(path) as arrays:
            held[arrays["features"].tobytes().decode()] = path.name
    assert set(held) == set(keys), "nothing is dropped"
    assert held["b/2.jpg"] == "2.npz", "a key without a double keeps its name"
    assert held["b/1.jpg"] == "b%2F1.jpg.npz" and held["3.tar.gz"] == "3.tar.gz.npz"
    assert any("2 entries left out" in line for line in logged) and any("neither NPZ nor msgpack" in line for line in logged)


def test_the_report_names_who_lost_what(messy_manifest: Path, own_store: Path, logged: list[str]) -> None:
    path = own_store
    text = messy_manifest.read_text(encoding="utf-8")
    manifest = messy_manifest.parent / "two.jsonl"
    manifest.write_text(text.replace("stereo.flac", "noise.wav").replace("mono.wav", "a.ogg"), encoding="utf-8")
    with pytest.raises(UserError, match=r"audio file is broken: noise.wav.*--strict"):
        update_modality(path, manifest, "audio", SETTINGS, workers=1, device="cpu", strict=True)
    cut = PrepareSettings(max_frames=5)
    update_modality(path, manifest, "audio", cut, workers=1, device="cpu")
    report = json.loads((path / REPORT_FILE).read_text())
    assert [entry["id"] for entry in report["dropped"]["audio"]] == ["ok-3"]
    assert "audio file is broken: noise.wav" in report["dropped"]["audio"][0]["reason"]
    assert any(line.startswith('  "ok-3": audio file is broken') for line in logged)
    assert report["truncated"]["audio"] == ["ok-1", "ok-4"]
    assert report["lengths"]["audio"]["rows"] == 2
    assert report["duplicates"]["audio"]["repeated"] == 1  # one file in two shards


def test_samples_whose_line_names_no_file_are_lost_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    @contextmanager
    def in_this_process(shards: list, folder: Path, choices: Any, settings: PrepareSettings, *_: Any) -> Iterator[Any]:
        features = FileFeatures(choices, settings, "cpu")
        names = ((kind, names) for shard in shards for kind, names in shard.files.items() if names)
        yield ((kind, names, features.chunk(kind, names, folder)) for kind, names in names)

    monkeypatch.setattr(update, "extraction", in_this_process)
    write_synthetic_store(tmp_path / "s", 5, samples_per_shard=3)
    soundfile.write(tmp_path / "a.wav", 0.3 * np.sin(np.arange(4000) / 9), 16000)
    lines = [{"id": f"sample{index}", "text": "x", **({} if index in (1, 4) else {"audio": "a.wav"})} for index in range(5)]
    manifest, options = tmp_path / "m.jsonl", {"workers": 1, "device": "cpu"}
    manifest.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    before = FeatureStore(tmp_path / "s").fingerprint
    with pytest.raises(UserError, match=r'sample "sample1": the manifest names no audio file .--strict'):
        update_modality(tmp_path / "s", manifest, "audio", SETTINGS, strict=True, **options)
    assert FeatureStore(tmp_path / "s").fingerprint == before
    logged.clear()
    update_modality(tmp_path / "s", manifest, "audio", SETTINGS, **options)
    assert "2 samples left without" in logged[0]
    assert logged[1:] == [f'  "sample{index}": the manifest names no audio file' for index in (1, 4)]
    update_modality(tmp_path / "s", manifest, "audio", SETTINGS, strict=True, **options)  # no further sample loses the modality
