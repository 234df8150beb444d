"""Eight processes read one store for ten epochs, forked or spawned from one that has it open: the same bytes, flat memory."""

import hashlib
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_ds.store import FeatureStore
from opt_ds.store.synthetic import write_synthetic_store

READERS, EPOCHS = 8, 10
MIB = 1 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 48 MiB: more than the memory that a reader may gain."""
    path = tmp_path_factory.mktemp("many") / "store"
    write_synthetic_store(path, 400, frames=(500, 500), audio_feature_dim=128, samples_per_shard=100, pixels=False)
    assert sum(file.stat().st_size for file in path.glob("*.h5")) > 45 * MIB
    return path


def resident_bytes() -> int:
    """Return this process's private memory, without mapped pages of files, which the system can reclaim."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def mapped_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
    return int(fields["RssFile"].split()[0]) * 1024


def read_all(store: FeatureStore, order: np.ndarray) -> str:
    """Read everything of the samples in some order; the hash does not depend on the order."""
    total = 0
    for index in order.tolist():
        text, image, audio = store.rows[index].tolist()
        digest = hashlib.blake2b(store.sample_id(index).encode(), digest_size=8)
        for array in (store.text(text), *store.regions(image), store.codes(image), store.frames(audio)):
            digest.update(np.ascontiguousarray(array).tobytes())
        total ^= int.from_bytes(digest.digest(), "little")
        if index % 50 == 0:
            store.release_pages()
    store.release_pages()
    return f"{total:016x}"


def reader(store: FeatureStore, number: int, results: Any) -> None:
    hashes, memory = [], []
    for epoch in range(EPOCHS):
        hashes.append(read_all(store, np.random.default_rng([number, epoch]).permutation(store.num_samples)))
        memory.append((resident_bytes(), mapped_bytes()))
    results.put((set(hashes), memory))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_eight_readers_for_ten_epochs(large: Path, method: str) -> None:
    store = FeatureStore(large)
    expected = read_all(store, np.arange(store.num_samples))  # opened before the fork
    context = multiprocessing.get_context(method)
    results = context.Queue()
    processes = [context.Process(target=reader, args=(store, number, results)) for number in range(READERS)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=280) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for hashes, memory in answers:
        assert hashes == {expected}
        for kind in (0, 1):
            gained = max(epoch[kind] for epoch in memory[1:]) - memory[0][kind]
            assert gained < 8 * MIB, f"{gained / MIB:.1f} MiB more after {EPOCHS} epochs"
