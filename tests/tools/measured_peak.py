"""A training run of two steps in a process of its own; prints the most memory that it took beyond a process that only imports.

python -m tests.tools.measured_peak CONFIG.yaml OUTPUT
"""

import json
import os
import sys
from pathlib import Path

from opt_ds.config import load_config
from opt_ds.engine.distributed import ProcessGroup, find_ranks
from tests.engine.runs import train


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def main() -> None:
    import opt_ds.engine.trainer  # noqa: F401 - part of the baseline

    group = ProcessGroup(find_ranks())
    before = _status_bytes("VmRSS")
    config = load_config(sys.argv[1])
    train(config, Path(sys.argv[2]), group, config.precision)
    if group.ranks.is_main:
        print(json.dumps({"baseline": before, "peak": _status_bytes("VmHWM")}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
