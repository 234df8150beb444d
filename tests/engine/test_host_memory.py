"""Freed memory is kept for what is allocated next, and a long accumulation gives back what it has too much. In processes of their
own: an allocator's ways cannot be undone."""

import os
import subprocess
import sys

import pytest

from opt_ds.engine.host_memory import keep_freed_memory

PREAMBLE = """
import resource, torch
from opt_ds.engine.host_memory import MemoryKeeper, _resident_pages, keep_freed_memory

def faults(mib):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mib * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory("cpu") == "kept"
"""


def run(program: str) -> list[int]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PREAMBLE + program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_users_own_settings_of_the_allocator_stand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert name in keep_freed_memory("cpu")


def test_what_is_freed_is_not_fetched_again() -> None:
    # Smaller: aligned blocks want more room than an equal one leaves, if what lies around it has been taken meanwhile.
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
