"""One folder of compiled emulator programs for all test processes of a run."""

import os

import pytest

from tests.csrc.emulated import Builder


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    own = tmp_path_factory.getbasetemp()  # within the folder of the run, if there are several processes
    return Builder((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "emulated")
