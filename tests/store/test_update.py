"""Test adding image codes to a finished store: a kill at any moment leaves a complete store."""

import os
from pathlib import Path

import numpy as np
import pytest

from opt_ds.errors import UserError
from opt_ds.store import FeatureStore, inspect_store, set_codes
from opt_ds.store.synthetic import write_synthetic_store

EXTRACTOR = {"name": "dvae", "num_codes": 8192, "weights_sha256": "00"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_synthetic_store(tmp_path / "s", 9, samples_per_shard=3, num_codes_vocab=None)
    return tmp_path / "s"


def all_codes(store: Path) -> np.ndarray:
    opened = FeatureStore(store)
    return np.stack([opened.codes(row) for row in range(len(opened.region_counts))])


def random_codes(seed: int, count: int = 9) -> np.ndarray:
    codes = np.random.default_rng(seed).integers(0, 8192, (count, 64)).astype("uint16")
    codes[0, :2] = (0, 8191)
    return codes


def test_codes_are_added_and_replaced(store: Path) -> None:
    before = FeatureStore(store)
    assert not before.has_codes
    frames = [before.frames(row).copy() for row in range(9)]
    fingerprints = [before.fingerprint]
    for seed in (1, 2):
        description = set_codes(store, random_codes(seed), EXTRACTOR)
        assert description.dims.num_codes == 8192
        assert description.extractors["codes"] == EXTRACTOR
        assert (all_codes(store) == random_codes(seed)).all()
        assert inspect_store(store).failures == []
        assert len(list(store.glob("shard-*.h5"))) == 3
        fingerprints.append(description.fingerprint)
    assert len(set(fingerprints)) == 3
    assert all((FeatureStore(store).frames(row) == frames[row]).all() for row in range(9))
    assert before.regions(0).features is not None  # opened before: its maps outlive the removed files


def test_an_update_removes_old_tokenizers_and_no_folder_of_the_users(store: Path) -> None:
    for name in ("tokenizer-r7", ".tokenizer-r8.12.tmp", "tokenizer-backup", "tokenizers"):
        (store / name).mkdir()
    set_codes(store, random_codes(1), EXTRACTOR)
    assert sorted(path.name for path in store.iterdir() if path.is_dir()) == ["tokenizer", "tokenizer-backup", "tokenizers"]


def test_wrong_codes_are_refused(store: Path) -> None:
    with pytest.raises(UserError, match=r"shape \[8, 64\], the store needs \[9, 64\]"):
        set_codes(store, random_codes(1, 8), EXTRACTOR)
    with pytest.raises(UserError, match="do not fit a codebook of 100"):
        set_codes(store, random_codes(1), {**EXTRACTOR, "num_codes": 100})
    assert inspect_store(store).failures == []


def test_damage_is_not_given_a_new_checksum(store: Path) -> None:
    damaged = store / "shard-00001.h5"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.h5: checksum differs"):
        set_codes(store, random_codes(1), EXTRACTOR)
    assert inspect_store(store).failures == ["shard-00001.h5: checksum differs from store.json's"]


def test_a_kill_at_any_moment_leaves_old_or_new(store: Path) -> None:
    """A child process ends at once at its k-th file operation, for every k until it lives to the end."""
    set_codes(store, random_codes(0), EXTRACTOR)
    old, outcomes = 0, []
    for moment in range(1, 200):
        child = os.fork()
        if child == 0:
            die_at(moment)
            set_codes(store, random_codes(moment), EXTRACTOR)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        codes = all_codes(store)
        assert (codes == random_codes(old)).all() or (codes == random_codes(moment)).all()
        assert inspect_store(store).failures == []
        if (codes == random_codes(moment)).all():
            old = moment
        outcomes.append(old == moment)
        if code == 0:
            break
    assert code == 0
    assert outcomes.count(False) > 8
    assert outcomes.count(True) > 2  # also killed between the new store.json and the removal of the old files
    assert len(list(store.glob("shard-*.h5"))) == 3
    assert not list(store.glob(".*"))


def die_at(moment: int) -> None:
    """End this process at its `moment`-th file operation."""
    calls = 0

    def deadly(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == moment:
                os._exit(9)
            return real(*arguments, **options)

        return call

    os.replace, os.fsync, os.unlink = deadly(os.replace), deadly(os.fsync), deadly(os.unlink)
    Path.unlink = deadly(Path.unlink)
