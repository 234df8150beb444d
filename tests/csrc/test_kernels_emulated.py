"""The CUDA sources, run on the CPU thread by thread, against float64: see check_kernels.cpp. The quick part here belongs to
`make test`; every architecture, length, thread order and sanitizer to `make test-kernels`."""

import pytest

from tests.csrc.emulated import Builder, run


@pytest.mark.timeout(900)
def test_the_kernels_of_sm_70_are_right(builder: Builder) -> None:
    found = run(builder.build(), "all", "quick")
    assert found.returncode == 0 and found.stdout.endswith("all ok\n"), found.stdout + found.stderr


@pytest.mark.kernels
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [70, 75, 80])
def test_every_length_and_width(builder: Builder, arch: int) -> None:
    found = run(builder.build(arch=arch), "all", "full")
    print(found.stdout)
    assert found.returncode == 0, "\n".join(line for line in found.stdout.splitlines() if not line.endswith(" ok")) + found.stderr


@pytest.mark.kernels
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("arch", [70, 80])
def test_the_order_of_threads_changes_nothing(builder: Builder, seed: int, arch: int) -> None:
    binary = builder.build(arch=arch)
    found = run(binary, "all", "quick", seed=seed)
    assert found.returncode == 0 and found.stdout == run(binary, "all", "quick").stdout, found.stdout + found.stderr


@pytest.mark.kernels
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("checker", ["asan", "tsan"])
@pytest.mark.parametrize("arch", [70, 75, 80])
def test_sanitizers_find_nothing(builder: Builder, checker: str, arch: int) -> None:
    """AddressSanitizer with UndefinedBehaviorSanitizer; ThreadSanitizer, to which only barriers order memory."""
    found = run(builder.build(checker=checker, arch=arch), "all", "quick", seed=3)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
