"""Training runs of two steps in this process; prints how much memory each took beyond what the process had before it.

python -m tests.tools.measured_peak FOLDER TINY.yaml CONFIG.yaml…     with ENVIRONMENT
"""

import gc
import json
import os
import sys
from pathlib import Path

from opt_ds.config import load_config
from opt_ds.training.distributed import ProcessGroup, find_ranks
from tests.training.runs import train

STEPS = 2
#: Every tensor of some size gets its own pages, returned when it is freed: the resident set is the memory in use, without the C
#: library's losses, which depend on what came before.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "32768",
    "MALLOC_MMAP_MAX_": "10000000",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))


def _measured(source: str, output: Path, group: ProcessGroup) -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    baseline, config = _resident_bytes(), load_config(source)
    train(config, output, group, config.precision)
    if not group.ranks.is_main:
        return 0
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[STEPS - 1])
    assert last["step"] == STEPS, "before validation and the checkpoint, which the model of memory leaves out"
    return round(last["memory/peak_gib"] * 2**30) - baseline


def main() -> None:
    folder, tiny, *configs = sys.argv[1:]
    group = ProcessGroup(find_ranks())
    train(load_config(tiny), Path(folder) / "tiny", group, "fp32")  # what is loaded at first use is loaded now
    peaks = [_measured(source, Path(folder) / Path(source).stem, group) for source in configs]
    if group.ranks.is_main:
        print(json.dumps(peaks), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
