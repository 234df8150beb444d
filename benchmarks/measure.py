"""Helpers of the benchmarks: interleaved timing, a description of the machine, the measured matmul peak, tables and
JSON.
"""

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

#: `wall`: wall-clock time. `cpu`: processor time of this process, for ratios on a machine that also runs other programs
#: (one thread).
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(
    methods: Mapping[str, Callable[[int], object]],
    repeats: int,
    clock: str = "wall",
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Return the seconds of each call, [repeat], of every method. They take turns, so that other load affects all of
    them.

    Each method is called with the number of the repeat, and once before with −1 to warm up. `clock` is one of
    CLOCKS. A GPU is synchronised before the clock is read.
    """
    on_gpu = torch.device(device).type == "cuda"

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return CLOCKS[clock]()

    for step in methods.values():
        step(-1)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats):
        for name, step in methods.items():
            began = now()
            step(repeat)
            seconds[name].append(now() - began)
    return seconds


def matmul(dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Callable[[int], object], float]:
    """Return ten square matrix products to be timed, and their number of operations.

    They are large enough to occupy the device, and take about as long as the call that they are compared with.
    """
    size = 8192 if torch.device(device).type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def products(_: int) -> None:
        for _ in range(10):
            torch.mm(left, right)

    return products, 10 * 2.0 * size**3


def summary(values: list[float]) -> dict[str, float]:
    """Return the median, the smallest and the largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """Return one method's time, divided by another's in the same repeat, for each repeat."""
    return [n / d for n, d in zip(numerator, denominator, strict=True)]


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Return the median over the repeats of one method's time, divided by another's in the same repeat."""
    return statistics.median(ratios(numerator, denominator))


def machine() -> dict[str, Any]:
    """Return a description of this machine and of the command that runs."""
    from opt_ds.training.deepspeed_config import Hardware

    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "device": Hardware.detect().name,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
    }


def _processor() -> str:
    """Return the processor's name with its family and model, which name its generation; "" if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        found.setdefault(name.strip(), value.strip())
    return f"{found.get('model name')} (family {found.get('cpu family')}, model {found.get('model')})"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write the figures as JSON if a file is named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
