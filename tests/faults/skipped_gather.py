"""pretrain.py whose second rank skips one gather of weights, as a model would whose modules are not called on every rank."""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.distributed import distributed_c10d

from opt_ds import pretrain
from opt_ds.data.step_plan import StepPlan
from opt_ds.training.step import Stepper

STEP = 1  # in which the first gather is skipped


class Done:
    """A collective that has nothing to wait for."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def skip_one() -> None:
    """Leave out the first gather of weights after step STEP has begun."""
    cls = distributed_c10d.ProcessGroup
    name = "all_gather_single" if hasattr(cls, "all_gather_single") else "_allgather_base"
    gather, take, armed = getattr(cls, name), Stepper.take, []

    def take_armed(self: Stepper, step_plan: StepPlan, micro_batches: Any) -> Any:
        if step_plan.step == STEP:
            armed.append(True)
        return take(self, step_plan, micro_batches)

    def gather_or_not(*arguments: Any, **options: Any) -> Any:
        if not armed:
            return gather(*arguments, **options)
        armed.clear()
        print("skipping a gather", file=sys.stderr, flush=True)
        return Done()

    setattr(cls, name, gather_or_not)
    Stepper.take = take_armed  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ["RANK"] == "1":
        skip_one()
    sys.exit(pretrain.main())
