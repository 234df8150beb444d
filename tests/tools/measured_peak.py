"""A training run of two steps in a process of its own; prints how much memory it took beyond a run of a model of no size.

python -m tests.tools.measured_peak TINY.yaml CONFIG.yaml FOLDER     with ENVIRONMENT
"""

import gc
import json
import os
import sys
from pathlib import Path

from opt_ds.config import load_config
from opt_ds.engine.distributed import ProcessGroup, find_ranks
from tests.engine.runs import train

STEPS = 2
#: Every tensor of some size gets pages of its own, given back when it goes: the resident set is what is in use, without the C
#: library's losses, which depend on what came before.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "32768",
    "MALLOC_MMAP_MAX_": "10000000",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def main() -> None:
    tiny, config, folder = load_config(sys.argv[1]), load_config(sys.argv[2]), Path(sys.argv[3])
    group = ProcessGroup(find_ranks())
    train(tiny, folder / "tiny", group, "fp32")  # what is loaded at first use is loaded now
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    baseline = _status_bytes("VmRSS")
    train(config, folder / "run", group, config.precision)
    if group.ranks.is_main:
        last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[STEPS - 1])
        assert last["step"] == STEPS, "before validation and the checkpoint, which the model of memory leaves out"
        print(json.dumps({"baseline": baseline, "peak": round(last["memory/peak_gib"] * 2**30)}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
