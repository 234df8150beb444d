"""One of the ranks that test_ranks.py starts: a list of runs, one after another (joining costs seconds)."""

import json
import sys
from pathlib import Path

from opt_ds.config import config_from_dict
from opt_ds.engine.distributed import ProcessGroup, find_ranks
from tests.engine.runs import train

if __name__ == "__main__":
    group = ProcessGroup(find_ranks())
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(config_from_dict(job["config"], where="job"), Path(job["output"]), group)
    group.close()
