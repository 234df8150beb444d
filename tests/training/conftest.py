"""Fixtures of the engine's tests."""

from pathlib import Path

import pytest

from tests.training.runs import make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic store."""
    return make_store(tmp_path_factory.mktemp("stores") / "small")


@pytest.fixture(scope="session")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with so few captions that a model soon knows their words: the loss falls."""
    return make_store(tmp_path_factory.mktemp("stores") / "learnable", 8, splits={"train": 0.5, "valid": 0.5})
