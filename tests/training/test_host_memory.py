"""Freed memory is kept for what is allocated next, oneDNN keeps the code of few shapes, and a long accumulation gives back what
it has too much. In separate processes, because an allocator's settings cannot be undone."""

import os
import subprocess
import sys

import pytest
import torch

from opt_ds.training.host_memory import MemoryKeeper, keep_few_primitives, keep_freed_memory

PREAMBLE = """
import resource, torch
from opt_ds.training.host_memory import MemoryKeeper, _resident_pages, keep_freed_memory

def faults(mib):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mib * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory("cpu") == "kept"
"""


OWN = ("MALLOC_", "GLIBC_TUNABLES", "ONEDNN_", "DNNL_")  # settings that a user may have


def output(program: str, **environment: str) -> str:
    others = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=others | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(program: str) -> list[int]:
    return [int(word) for word in output(PREAMBLE + program).split()]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_users_own_settings_of_the_allocator_stand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert name in keep_freed_memory("cpu")


def test_a_users_own_capacity_of_onednn_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)  # a run in this process may have set it
    monkeypatch.setenv("DNNL_PRIMITIVE_CACHE_CAPACITY", "7")
    assert "DNNL_PRIMITIVE_CACHE_CAPACITY" in keep_few_primitives("cpu", "fp32")
    assert os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") is None


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_onednn_keeps_the_code_of_the_last_shapes_only() -> None:
    told = """
import torch
from opt_ds.training.host_memory import keep_few_primitives

torch.ones(2).exp()
print(keep_few_primitives("cpu", "fp32"))
for rows in [50, 50, *range(100, 120), 50]:
    torch.nn.functional.gelu(torch.ones(rows, 64))
"""
    lines = output(told, ONEDNN_VERBOSE="profile_create").splitlines()
    assert "the last 16" in lines
    found = ["hit" if "cache_hit" in line else "miss" for line in lines if "gelu" in line and ",50x64," in line]
    assert found == ["miss", "hit", "miss"]


def test_what_is_freed_is_not_fetched_again() -> None:
    # Smaller: aligned blocks require more space than an equal one leaves, if its neighbours have been allocated meanwhile.
    first, second = run("print(faults(256), faults(200))")
    assert first > 50 * max(second, 1), "256 MiB are 65,536 pages, or 128 large ones"


def test_a_long_accumulation_that_grows_gives_memory_back() -> None:
    pages = run("""
keeper = MemoryKeeper([])
for number, mib in enumerate([100, 100, 100, 400]):
    torch.ones(mib * 2**18)
    held = _resident_pages()
    keeper.after_micro_batch(number)
    print(held, _resident_pages())
""")
    held, left = pages[::2], pages[1::2]
    page_mib = 2**20 // 4096
    assert all(abs(left[n] - held[n]) < page_mib for n in (0, 1, 2)), "the first show what is needed"
    assert held[3] - left[3] > 350 * page_mib, "what one large micro-batch took is given back"


def test_memory_is_given_back_seldom_and_a_stores_pages_whenever_it_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    class Store:
        def release_pages(self) -> None:
            given.append("pages")

    keeper = MemoryKeeper([Store()])  # type: ignore[list-item]
    keeper._trim = lambda _: given.append("freed memory")
    held = [1000, 1000, 1000, 1040, *[2000] * 40]  # a little more than needed, then much more, whatever is returned
    monkeypatch.setattr("opt_ds.training.host_memory._resident_pages", lambda: held[number])
    by_micro_batch = []
    for number in range(len(held)):
        given.clear()
        keeper.after_micro_batch(number)
        by_micro_batch.append(list(given))
    assert by_micro_batch[:4] == [[], [], [], []]
    assert all("pages" in done for done in by_micro_batch[4:])
    assert [number for number, done in enumerate(by_micro_batch) if "freed memory" in done] == [4, 20, 36]
