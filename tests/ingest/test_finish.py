"""Parts of a store, made apart as a job array makes them: joined they are the store that one process makes, byte for byte."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from opt_ds.errors import UserError
from opt_ds.ingest import PrepareSettings, finish, prepare
from opt_ds.ingest.finish import merge_parts, parse_partition, part_folder
from opt_ds.ingest.report import REPORT_FILE
from opt_ds.store.synthetic import write_synthetic_store
from tests.ingest.conftest import SETTINGS
from tests.ingest.test_pipeline import contents


def make_part(manifest: Path, output: Path, index: int, settings: PrepareSettings = SETTINGS) -> None:
    assert prepare(manifest, output, settings, workers=1, device="cpu", partition=(index, 2)) is None


@pytest.fixture(scope="module")
def parts(messy_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store's two parts."""
    folder = tmp_path_factory.mktemp("parts")
    for index in (1, 0):
        make_part(messy_manifest, folder / "store", index)
    return folder


def test_merged_parts_are_the_store(parts: Path, messy_manifest: Path, tmp_path: Path) -> None:
    shutil.copytree(parts, tmp_path / "apart")
    prepare(messy_manifest, tmp_path / "whole", SETTINGS, workers=1, device="cpu")
    store = tmp_path / "apart" / "store"
    merged = merge_parts(store)
    assert contents(store) == contents(tmp_path / "whole")
    assert merged.num_samples == 7
    assert "bad-image" in (store / REPORT_FILE).read_text()
    assert [path.name for path in store.parent.iterdir()] == ["store"], "the parts are gone"
    assert merge_parts(store) == merged


class _Killed:
    """A logger at whose first message the process ends: the store is there by then."""

    def info(self, _: str) -> None:
        raise RuntimeError("killed")


def test_a_merge_that_was_stopped_goes_on(parts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(parts, tmp_path / "apart")
    store = tmp_path / "apart" / "store"
    whole = merge_parts(store)
    shutil.rmtree(tmp_path / "apart")
    shutil.copytree(parts, tmp_path / "apart")
    moved = part_folder(store, 0, 2)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(finish, "_LOG", _Killed())
        merge_parts(store)
    assert moved.is_dir()
    assert merge_parts(store) == whole
    assert not moved.exists()


@pytest.mark.parametrize("moment", range(1, 12, 2))
def test_a_merge_that_was_stopped_while_it_removed_its_parts_goes_on(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    shutil.copytree(parts, tmp_path / "apart")
    store = tmp_path / "apart" / "store"
    calls = 0

    def deadly(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object, **options: object) -> None:
            nonlocal calls
            calls += (store / "store.json").is_file()
            if calls == moment:
                raise KeyboardInterrupt
            real(*arguments, **options)

        return call

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, deadly(getattr(os, name)))
        patch.setattr(Path, "unlink", deadly(Path.unlink))
        merge_parts(store)
    assert merge_parts(store).num_samples == 7
    assert [path.name for path in store.parent.iterdir() if "part" in path.name] == []


def test_another_store_keeps_its_place(parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts, tmp_path / "apart")
    store = tmp_path / "apart" / "store"
    write_synthetic_store(store, 4)
    with pytest.raises(UserError, match=r"another finished feature store is there, store\.part-0-of-2 is not a partition of it"):
        merge_parts(store)
    assert part_folder(store, 0, 2).is_dir()


def test_a_set_that_is_not_whole_is_refused(parts: Path, messy_manifest: Path, tmp_path: Path) -> None:
    shutil.copytree(parts, tmp_path / "apart")
    store = tmp_path / "apart" / "store"
    shutil.move(part_folder(store, 1, 2), tmp_path / "aside")
    with pytest.raises(UserError, match="partition 1 of 2 missing"):
        merge_parts(store)
    (tmp_path / "aside" / "part.json").rename(tmp_path / "part.json")
    shutil.move(tmp_path / "aside", part_folder(store, 1, 2))
    with pytest.raises(UserError, match="unfinished"):
        merge_parts(store)
    with pytest.raises(UserError, match="no partitions next to it"):
        merge_parts(tmp_path / "other")


@pytest.mark.parametrize("text", ["2", "2/2", "-1/2", "a/b", "1/", "²/3", "0/³"])
def test_a_share_is_i_of_n(text: str) -> None:
    with pytest.raises(UserError, match="--partition"):
        parse_partition(text)
    assert parse_partition("0/1") == (0, 1)
