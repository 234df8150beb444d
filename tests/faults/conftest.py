"""The store that the faulty runs read."""

from pathlib import Path

import pytest

from tests.training.runs import make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "small")
