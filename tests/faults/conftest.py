"""The store that the faulty runs read, and the signals that they must be able to get."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.runs import make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "small")


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> Iterator[None]:
    """A shell starts its background jobs deaf to Ctrl-C, and so would be every run that the tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
