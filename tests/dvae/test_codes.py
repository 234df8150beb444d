"""Test a dVAE's codes in a store: written with the dVAE that made them, and never decoded by another one."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from opt_ds.dvae.codes import CodeExtractor, write_missing_codes
from opt_ds.dvae.model import DVAE_PRESETS, DiscreteVAE
from opt_ds.dvae.storage import load_store_dvae
from opt_ds.errors import UserError
from opt_ds.store import FeatureStore, inspect_store, verify_store
from opt_ds.store.files import exclusive_use
from opt_ds.store.split import split_by_ratio
from opt_ds.store.synthetic import write_synthetic_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_synthetic_store(tmp_path / "s", 12, num_codes_vocab=None, samples_per_shard=5)
    return tmp_path / "s"


def make_extractor(seed: int = 0) -> CodeExtractor:
    torch.manual_seed(seed)
    return CodeExtractor(DiscreteVAE(DVAE_PRESETS["dvae-tiny"]))


def test_codes_wait_for_another_process_that_writes_the_store(store: Path, logged: list[str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        with exclusive_use(store):
            written = pool.submit(write_missing_codes, store, make_extractor())
            deadline = time.monotonic() + 60
            while not (logged or written.done()) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert "another process is writing it: waiting" in logged[0]
            split_by_ratio(store, {"train": 0.5, "valid": 0.5})
        assert written.result()
    opened = FeatureStore(store)
    assert opened.has_codes and opened.description.split_counts["valid"] > 1
    assert inspect_store(store).failures == []


def test_a_kill_between_codes_and_their_dvae_is_named_and_mended(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_missing_codes(store, make_extractor())
    new = make_extractor(seed=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("opt_ds.dvae.codes.shutil.rmtree", _killed)
        write_missing_codes(store, new)
    description = FeatureStore(store).description
    assert description.extractors["codes"] == new.fingerprint()
    message = "not the dVAE that made the store's codes"
    with pytest.raises(UserError, match=message):
        load_store_dvae(store, description)
    with pytest.raises(UserError, match=message):
        verify_store(store)
    assert [message in failure for failure in inspect_store(store).failures] == [True]
    assert list(store.glob(".dvae.*.tmp"))
    assert write_missing_codes(store, new)
    verify_store(store)
    assert load_store_dvae(store, description).fingerprint() == new.fingerprint()
    assert not list(store.glob(".*"))


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
