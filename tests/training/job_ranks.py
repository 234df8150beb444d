"""One of the ranks that test_ranks.py starts: a list of runs, one after another (joining costs seconds).

Their steps are small; their plans are shared all the same.
"""

import json
import sys
from pathlib import Path
from typing import Any

from opt_ds.config import config_from_dict
from opt_ds.data import shared_plans
from opt_ds.training.distributed import ProcessGroup, find_ranks
from tests.training.runs import train

_read_plan = shared_plans.read_plan
_found: list[bool] = []


def read_and_note(*arguments: Any) -> Any:
    step_plan = _read_plan(*arguments)
    _found.append(step_plan is not None)
    return step_plan


if __name__ == "__main__":
    shared_plans._SHARED_FROM, shared_plans.read_plan = 1, read_and_note
    group = ProcessGroup(find_ranks())
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(config_from_dict(job["config"], where="job"), Path(job["output"]), group)
    assert _found and all(_found), "other ranks' plans were used"
    group.close()
