"""One folder of compiled emulator programs for all tests of a process."""

import pytest

from tests.csrc.emulated import Builder


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("emulated"))
