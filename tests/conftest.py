"""Fixtures of all tests: one thread per process, since several test processes share few cores; stores that many tests read."""

import gc
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ("tests.small_disk",)

if TYPE_CHECKING:
    from opt_ds.store import FeatureStore

#: Files that take longest, or wait most: begun first, so that no test process is left alone with one at the end.
LONGEST = ("slurm/test_pretrain", "training/test_ranks", "training/test_resume", "faults/test_kills", "faults/test_lost_ranks",
           "faults/test_disk", "tools/test_memory", "faults/test_matrix", "training/test_pretrain", "faults/test_launchers",
           "training/test_gradients", "tools/test_plan", "ingest/test_retry", "ingest/test_campaign", "ingest/test_full_disk",
           "ingest/test_localized_narratives_run", "csrc/test_seeded_bugs")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others, and the tests within a file, in their order."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get("/".join(item.path.with_suffix("").parts[-2:]), len(place)))


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection, which DeepSpeed requests often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> Iterator[None]:
    """A shell's background jobs ignore Ctrl-C and those of nohup SIGHUP, and so would every process that the tests start."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What `opt_ds` logs during the test, from INFO on: a text a message."""
    from tests.logs import logged_lines

    with logged_lines() as lines:
        yield lines


@pytest.fixture(scope="session")
def complete(tmp_path_factory: pytest.TempPathFactory) -> "FeatureStore":
    """Every sample has all three modalities."""
    from tests.tiny import make_store

    return make_store(tmp_path_factory.mktemp("stores") / "complete", 100, samples_per_shard=30)


@pytest.fixture(scope="session")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> "FeatureStore":
    """Samples of every subset of modalities."""
    from tests.tiny import make_store

    return make_store(tmp_path_factory.mktemp("stores") / "ragged", 100, missing=0.4, seed=1)


@pytest.fixture(scope="session")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> "FeatureStore":
    """Four samples per group, so that a negative must come from another group and not only be another sample."""
    from tests.tiny import make_store

    return make_store(tmp_path_factory.mktemp("stores") / "grouped", 80, samples_per_group=4, seed=2)


@pytest.fixture(scope="session")
def no_codes(tmp_path_factory: pytest.TempPathFactory) -> "FeatureStore":
    from tests.tiny import make_store

    return make_store(tmp_path_factory.mktemp("stores") / "no_codes", 40, num_codes_vocab=None, seed=3)

@pytest.fixture(scope="session")
def group() -> Iterator[Any]:
    """Return this process as a run's only rank. All tests of a process share it, since PyTorch has one default group."""
    from opt_ds.training.distributed import ProcessGroup, find_ranks

    joined = ProcessGroup(find_ranks())
    yield joined
    joined.close()
