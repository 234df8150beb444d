"""Test the folder that the ranks of a node share: removed at the end or, after a kill, at the next start."""

import fcntl
from pathlib import Path
from typing import Any

import pytest

from opt_ds.training import node_folder
from opt_ds.training.distributed import Ranks
from opt_ds.training.node_folder import NodeFolder


class Group:
    """What one rank of three sees of the others: rank 1 is on another node."""

    def __init__(self, rank: int, token: str) -> None:
        self.ranks, self._token = Ranks(rank, 3), token

    def from_main(self, value: Any) -> Any:
        return self._token

    def gather(self, value: Any) -> list[Any]:
        other = ("another kernel", 0)
        return [value, other, value] if self.ranks.rank != 1 else [other, value, other]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(node_folder, "_MEMORY", tmp_path)
    return tmp_path


def open_all(token: str) -> list[NodeFolder]:
    return [NodeFolder(Group(rank, token)) for rank in range(3)]  # type: ignore[arg-type]


def test_ranks_of_a_node_have_one_folder(base: Path) -> None:
    first, elsewhere, second = open_all("a")
    assert first.path == second.path != elsewhere.path and first.path.is_dir()
    assert [(folder.place, folder.count, folder.is_own) for folder in (first, elsewhere, second)] == [
        (0, 2, True), (0, 1, False), (1, 2, False)
    ]  # fmt: skip
    assert first.path.stat().st_mode & 0o077 == 0, "nobody else's"
    second.close()
    assert first.path.is_dir()
    first.close()
    assert not list(base.iterdir())


def test_a_killed_launch_is_removed_and_a_running_one_stays(base: Path) -> None:
    running = open_all("running")[0]
    killed = open_all("killed")[0]
    (killed.path / "rank-1").mkdir()
    (killed.path / "rank-1" / "7").write_bytes(bytes(1000))
    assert killed._lock is not None
    fcntl.flock(killed._lock, fcntl.LOCK_UN)  # as the end of its process does
    following = open_all("following")[0]
    assert sorted(base.iterdir()) == sorted([running.path, following.path])
    for folder in (running, following):
        folder.close()


def test_a_folder_that_cannot_be_made_is_none(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / ".opt-ds-ranks-a-0").write_text("in the way")
    first = open_all("a")[0]
    assert not first.is_own and not first.path.exists()
    first.close()
