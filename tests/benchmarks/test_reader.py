"""The readers of benchmarks/reader.py return the samples of the store."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import reader
from benchmarks.readers import FRAME_DIM, FRAMES, REGION_DIM, REGIONS, Hdf5, Hdf5Lookups, Lmdb, Ours, OursAhead
from opt_ds.store.reader import FeatureStore
from opt_ds.store.synthetic import write_synthetic_store

SAMPLES = 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several shards, whose samples have the lengths that the formats assume."""
    path = tmp_path_factory.mktemp("reader") / "store"
    write_synthetic_store(path, SAMPLES, regions=(REGIONS, REGIONS), frames=(FRAMES, FRAMES), pixels=False,
                          image_feature_dim=REGION_DIM, audio_feature_dim=FRAME_DIM, samples_per_shard=15)  # fmt: skip
    return path


def new_batch() -> tuple[np.ndarray, np.ndarray]:
    shapes = (reader.BATCH * REGIONS, REGION_DIM), (reader.BATCH * FRAMES, FRAME_DIM)
    return np.zeros(shapes[0], np.float16), np.zeros(shapes[1], np.float16)


@pytest.mark.parametrize("kind", [Ours, OursAhead, Hdf5, Hdf5Lookups, Lmdb])
def test_a_reader_returns_the_samples_in_any_order(kind: type, source: Path, tmp_path: Path) -> None:
    store, order = FeatureStore(source), np.random.default_rng(0).permutation(SAMPLES)
    opened = kind(tmp_path, source)  # LMDB's values are valid as long as its environment
    found = list(opened.samples(order))
    assert len(found) == SAMPLES
    for index, (regions, frames) in zip(order, found, strict=True):
        _, image, audio = store.rows[index].tolist()
        np.testing.assert_array_equal(regions, store.region_features(image))
        np.testing.assert_array_equal(frames, store.frames(audio))


@pytest.mark.parametrize("kind", [Ours, Hdf5, Hdf5Lookups])
def test_a_batch_holds_the_samples_in_their_order(kind: type, source: Path, tmp_path: Path) -> None:
    order, batch = np.random.default_rng(1).permutation(SAMPLES)[: reader.BATCH], new_batch()
    store = FeatureStore(source)
    reader.packed(kind(tmp_path, source), order, batch)
    rows = store.rows[order].tolist()
    np.testing.assert_array_equal(batch[0], np.concatenate([store.region_features(image) for _, image, _ in rows]))
    np.testing.assert_array_equal(batch[1], np.concatenate([store.frames(audio) for _, _, audio in rows]))


def test_h5py_opens_and_looks_up_nothing_while_it_reads(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline in its best form holds files and datasets open."""
    import h5py

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("looked up while reading")

    held, lookups = Hdf5(tmp_path, source), Hdf5Lookups(tmp_path, source)
    monkeypatch.setattr(h5py.Group, "__getitem__", refuse)
    monkeypatch.setattr(h5py.File, "__init__", refuse)
    order = np.arange(SAMPLES)
    assert len(list(held.samples(order))) == SAMPLES
    reader.packed(held, order, new_batch())
    with pytest.raises(AssertionError, match="looked up"):
        list(lookups.samples(order))


class Shifted(Hdf5):
    """A baseline that reads other rows than it should."""

    name = "shifted"

    def fill(self, order: np.ndarray, batch: tuple[np.ndarray, ...]) -> None:
        super().fill(order + 1, batch)


def test_a_reader_of_other_values_is_refused(source: Path, tmp_path: Path) -> None:
    readers = [Ours(tmp_path, source), Hdf5(tmp_path, source), Hdf5Lookups(tmp_path, source)]
    reader.check_same_values(readers, source, 20, new_batch())
    with pytest.raises(ValueError, match="shifted: its batch"):
        reader.check_same_values([Shifted(tmp_path, source)], source, 20, new_batch())


def test_the_script_measures_every_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["reader.py", "--samples", "40", "--repeats", "2", "--cold-repeats", "1",
                 "--folder", str(tmp_path / "work"), "--output", str(tmp_path / "out.json")]  # fmt: skip
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(reader, "memory_rate", lambda: 1e9)  # copies half a gigabyte
    reader.main()
    printed = capsys.readouterr().out
    for name in ("opt_ds", "h5py, datasets held open", "h5py, datasets looked up per sample", "LMDB"):
        assert f"| {name} |" in printed
    assert "opt_ds over h5py, datasets held open, packed, warm" in printed
    assert not (tmp_path / "work").exists()
