"""Plans are those of earlier releases to the bit: a run that this code continues sees the samples that it would have seen."""

import hashlib
from typing import Any

import numpy as np
import pytest

from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.step_plan import StepPlan
from opt_ds.tools.assumed_store import AssumedStore
from tests.tiny import make_config

GOLDEN = {
    ("samples", 24, 1, 1): "c5f79da9438ec104",
    ("samples", 24, 1, 7): "c1445c0ae4c87da1",
    ("samples", 3000, 1, 7): "3b73326eca43f76c",
    ("samples", 3000, 2, 64): "05a0b607b1b671ea",
    ("tokens", 4000, 2, 3): "9ce05602fb9cb16c",
}


def digest(step_plan: StepPlan) -> str:
    """Return a hash of the complete plan."""
    found = hashlib.sha256()
    for array in step_plan.samples.arrays().values():
        found.update(np.ascontiguousarray(array).tobytes())
    found.update(
        repr(
            (
                step_plan.counts,
                int(step_plan.num_tokens),
                float(step_plan.packing_efficiency),
                float(step_plan.load_imbalance),
            )
        ).encode()
    )
    for rank in step_plan.micro_batches:
        for m in rank:
            found.update(m.indices.tobytes() + repr((int(m.num_tokens), float(m.cost))).encode())
    return found.hexdigest()[:16]


def digest_of(unit: str, size: int, num_stores: int, ranks: int) -> str:
    config = make_config(batch={"size": size, "unit": unit})
    stores: list[Any] = [AssumedStore(config.model, 5 + number, 4, 9) for number in range(num_stores)]
    return digest(PretrainingPlan(config, stores).step(3, ranks))


@pytest.mark.parametrize("key", GOLDEN)
def test_the_plan_is_the_one_that_it_was(key: tuple[str, int, int, int]) -> None:
    assert digest_of(*key) == GOLDEN[key]
