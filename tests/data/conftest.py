"""Stores that the tests of planning and packing read."""

import pytest
import torch

from opt_ds.store import FeatureStore
from tests.tiny import make_store


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def complete(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Every sample has all three modalities."""
    return make_store(tmp_path_factory.mktemp("stores") / "complete", 100, samples_per_shard=30)


@pytest.fixture(scope="session")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Samples of every subset of modalities."""
    return make_store(tmp_path_factory.mktemp("stores") / "ragged", 100, missing=0.4, seed=1)


@pytest.fixture(scope="session")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Four samples a group: a donor must come from another group, not only be another sample."""
    return make_store(tmp_path_factory.mktemp("stores") / "grouped", 80, samples_per_group=4, seed=2)


@pytest.fixture(scope="session")
def no_codes(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("stores") / "no_codes", 40, num_codes_vocab=None, seed=3)
