"""Test files that are either complete or absent."""

import os
from pathlib import Path

import pytest

from opt_ds.store.files import atomic_file, atomic_folder, remove_leftovers


def test_two_hosts_processes_of_one_number_write_one_file_without_collision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "verified.json"
    with atomic_file(path) as first:
        first.write_text("one")
        with atomic_file(path) as second:
            second.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "shard-1.h5") as temporary:
        temporary.touch()
        remove_leftovers(tmp_path, "shard-*.h5")
        assert not temporary.exists()


def test_processes_that_write_one_folder_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    """As two runs that start in one output folder: none of them removes what the other one is writing."""
    target = tmp_path / "processor"
    with atomic_folder(target) as first:
        first.mkdir()
        (first / "of").write_text("first")
        with atomic_folder(target) as second:
            second.mkdir()
            (second / "of").write_text("second")
        assert (target / "of").read_text() == "second" and (first / "of").read_text() == "first"
    assert (target / "of").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["processor"]


def test_a_folder_that_is_not_finished_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("old")
    abandoned, recent = tmp_path / ".kept.0a.tmp", tmp_path / ".kept.0b.tmp"
    for leftover in (abandoned, recent):
        leftover.mkdir()
    os.utime(abandoned, (0, 0))
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "kept") as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert (tmp_path / "kept" / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kept.0b.tmp", "kept"], "another process may be writing"
