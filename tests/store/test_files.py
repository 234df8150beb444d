"""Test files that are either complete or absent."""

import os
from pathlib import Path

import pytest

from opt_ds.store.files import atomic_file, remove_leftovers


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
