"""Writing: a stopped run resumes, another run's output is never touched."""

from dataclasses import replace
from pathlib import Path

import pytest

from opt_ds.errors import UserError
from opt_ds.store import FeatureStore
from opt_ds.store import writer as writer_module
from opt_ds.store.synthetic import write_synthetic_store


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic_store(tmp_path / "whole", 20, samples_per_shard=5)
    real, calls = writer_module.write_datasets, []

    def stop_in_third(path: Path, *arguments: object, **options: object) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half a shard")
            raise Stopped
        real(path, *arguments, **options)

    monkeypatch.setattr(writer_module, "write_datasets", stop_in_third)
    with pytest.raises(Stopped):
        write_synthetic_store(tmp_path / "s", 20, samples_per_shard=5)
    monkeypatch.undo()
    assert sorted(file.name for file in (tmp_path / "s").glob("shard-*.h5")) == ["shard-00000.h5", "shard-00001.h5"]
    with pytest.raises(UserError, match="unfinished feature store"):
        FeatureStore(tmp_path / "s")
    (tmp_path / "s" / ".shard-00002.h5.77.tmp").write_bytes(b"what a kill leaves")
    write_synthetic_store(tmp_path / "s", 20, samples_per_shard=5)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_other_outputs_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic_store(tmp_path / "done", 3)
    before = files(tmp_path / "done")
    with pytest.raises(UserError, match="finished feature store is there"):
        write_synthetic_store(tmp_path / "done", 3)
    assert files(tmp_path / "done") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not a feature store"):
        write_synthetic_store(tmp_path / "other", 3)
    assert list(files(tmp_path / "other")) == ["thesis.txt"]
    monkeypatch.setattr(writer_module.StoreWriter, "finish", lambda *_: None)
    write_synthetic_store(tmp_path / "half", 3, seed=1)
    with pytest.raises(UserError, match="unfinished store of other inputs"):
        write_synthetic_store(tmp_path / "half", 3, seed=2)


def test_an_image_whose_labels_do_not_fit_its_features_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels of every later image in the shard would shift."""
    real = writer_module.StoreWriter.write_shard

    def cut_labels(self: writer_module.StoreWriter, index: int, content: writer_module.ShardContent, **options: object) -> None:
        content.images[0] = replace(content.images[0], labels=content.images[0].labels[:-1])
        real(self, index, content, **options)

    monkeypatch.setattr(writer_module.StoreWriter, "write_shard", cut_labels)
    with pytest.raises(UserError, match=r'sample "sample0": image: labels of shape \[7\], not \[8\]'):
        write_synthetic_store(tmp_path / "s", 3, regions=(8, 8))
    assert not list((tmp_path / "s").glob("shard-*"))
