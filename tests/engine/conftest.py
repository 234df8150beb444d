"""Fixtures of the engine's tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.runs import make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic store."""
    return make_store(tmp_path_factory.mktemp("stores") / "small")


@pytest.fixture(scope="session")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with so few captions that a model soon knows their words: the loss falls."""
    return make_store(tmp_path_factory.mktemp("stores") / "learnable", 8, splits={"train": 0.5, "valid": 0.5})


@pytest.fixture(scope="session")
def group() -> Iterator[Any]:
    """This process as a run's only rank."""
    from opt_ds.engine.distributed import ProcessGroup, find_ranks

    joined = ProcessGroup(find_ranks())
    yield joined
    joined.close()
