"""A local Slurm for the tests of this folder; without one they are skipped with the reason."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.local_cluster import LocalCluster, SlurmMissingError
from tests.training.runs import make_store


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """Three nodes: two for a job, one for when one of them dies."""
    try:
        local = LocalCluster(3)
    except SlurmMissingError as error:
        pytest.skip(str(error))
    with local:
        local.environment["OPT_DS_DOCTOR"] = "0"  # one test has it; it takes seconds
        yield local


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "small")
