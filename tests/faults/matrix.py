"""Every way in which DeepSpeed can train: stage, ranks, precision, offload, persistence, recomputation.

Each run trains all tasks for STEPS steps with the same hardships: a loss that is NaN and a gradient that is infinite on one
rank, micro-batches without samples, and tasks that only one rank has. Losses are compared with those of stage 0 in fp32 on
one rank, where the same steps are skipped. A second run stops at step CUT and is resumed; its weights must be the same bits.

A process runs a list of combinations one after another, because starting a process costs more than training in it.

`python -m tests.faults.matrix JOBS` runs as one rank of several; see `run_ranks`.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.config import Config
from opt_ds.data.micro_batches import MicroBatchPlan
from opt_ds.data.step_plan import Plan, StepPlan
from opt_ds.errors import UserError
from opt_ds.training.deepspeed_config import Hardware, choose_precision, deepspeed_settings
from opt_ds.training.distributed import ProcessGroup, find_ranks
from tests.tiny import MATCHING, MODALITY
from tests.training.runs import free_port, hashes, losses, rank_environment, tiny_config, train, zero_moments
from tests.warm import WarmProcess

STEPS, CUT = 6, 4
NAN_LOSS, INFINITE_GRADIENT = 1, 3  # steps that are not taken
#: Largest relative difference of a step's loss from fp32 at stage 0. Dropped moments (`FORGETFUL`) differ by more than each.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.008, "fp16": 0.008}
SETTINGS = (
    f"train.max_steps={STEPS}", "schedule.total_steps=50", "optimizer.lr=0.01", "batch.size=12", "batch.max_tokens=1000",
    "model.num_layers=2", "model.text_decoder_layers=1", "model.image_decoder_layers=1",
    "model.dropout=0", "model.attention_dropout=0",  # torch's dropout depends on the rank
    "guard.compare_ranks_every=2", "train.validate_every=4", "train.validate_samples=2", "checkpoint.every_steps=1000",
    "guard.rank_timeout_s=60",
)  # fmt: skip


@dataclass(frozen=True)
class Combination:
    """One way to train."""

    stage: int = 0
    ranks: int = 1
    precision: str = "fp32"
    offload: bool = False
    gather_all: bool = False  # stage 3: no weight stays gathered, none is gathered ahead or kept for its next use
    recompute: bool = False

    @property
    def name(self) -> str:
        """Return the name of a table row and of a folder."""
        words = [f"stage {self.stage}", f"{self.ranks} ranks", self.precision]
        words += [word.replace("_", " ") for word in ("offload", "gather_all", "recompute") if getattr(self, word)]
        return ", ".join(words)


@dataclass(frozen=True)
class Outcome:
    """What came of a combination: losses by step, or why it was refused."""

    combination: Combination
    losses: dict[int, float]
    refused: str = ""
    resumed_equal: bool = False
    adam_steps: int = 0


REFERENCE = Combination()


def combinations(ranks: int) -> list[Combination]:
    """All of them for this many ranks, those without an effect left out."""
    found = []
    for stage, precision, offload, gather_all, recompute in product(
        range(4), ("fp32", "bf16", "fp16"), (False, True), (False, True), (False, True)
    ):
        if stage == 3 or not gather_all:
            found.append(Combination(stage, ranks, precision, offload, gather_all, recompute))
    return found


def config_of(combination: Combination, store: Path, folder: Path, *settings: str) -> Config:
    """The run's configuration. Raises UserError for what is refused."""
    tree: dict[str, Any] = {}
    if combination.precision != "fp32":
        tree[combination.precision] = {"enabled": True}
    if combination.precision == "fp16":
        tree["fp16"]["initial_scale_power"] = 10  # no overflow but the one that is wanted
    if combination.gather_all:
        tree["zero_optimization"] = {
            "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0,
            "stage3_prefetch_bucket_size": 0,
        }  # fmt: skip
    file = folder / f"{combination.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    own_file = file.with_suffix(f".{os.getpid()}")  # Every rank writes it, so none may read it half-written.
    own_file.write_text(json.dumps(tree))
    own_file.replace(file)
    own = (f"zero.stage={combination.stage}", f"zero.offload_optimizer={str(combination.offload).lower()}",
           f"train.recompute={str(combination.recompute).lower()}", f"precision={combination.precision}",
           f"deepspeed_config={file}")  # fmt: skip
    return tiny_config(store, *SETTINGS, *own, *settings)


def until(config: Config, steps: int) -> Config:
    """Return the same run, stopped after this many steps."""
    return config.model_copy(update={"train": config.train.model_copy(update={"max_steps": steps})})


def run(
    combination: Combination, store: Path, folder: Path, group: ProcessGroup, *settings: str, last: int = STEPS
) -> Outcome:
    """Train without a stop, and again in two parts; or report why the run is refused before training."""
    straight, cut = folder / combination.name, folder / f"{combination.name}, cut"
    fp16 = combination.precision == "fp16"  # which the product does not run on a CPU
    try:
        config = until(config_of(combination, store, folder, *settings), last)
        precision = "fp16" if fp16 else choose_precision(config, Hardware.detect())
        deepspeed_settings(config, precision)
    except UserError as error:
        return Outcome(combination, {}, str(error))
    with hardships(group.ranks.rank, group.ranks.world_size):
        assert train(config, straight, group, precision) == 0
        for steps in (CUT, last):
            assert train(until(config, steps), cut, group, precision) == 0
    group.barrier()
    state = json.loads((straight / "checkpoints" / f"step-{last:08d}" / "state.json").read_text())
    same = hashes(straight, last) == hashes(cut, last) and losses(straight) == losses(cut)
    return Outcome(combination, losses(straight), "", same, state["adam_steps"])


def forgetful(combination: Combination, store: Path, folder: Path, group: ProcessGroup) -> dict[int, float]:
    """Return the losses of a run whose moments are dropped at step CUT, which a comparison must detect."""
    output = folder / f"{combination.name}, forgetful"
    config = config_of(combination, store, folder)
    with hardships(group.ranks.rank, group.ranks.world_size):
        train(until(config, CUT), output, group)
        zero_moments(output, CUT)
        train(config, output, group)
    return losses(output)


def difference(found: dict[int, float], expected: dict[int, float]) -> float:
    """The largest relative difference of a step's loss; infinite where a step is missing in one."""
    if found.keys() != expected.keys():
        return math.inf
    return max(abs(found[step] / expected[step] - 1) for step in expected)


def verdict(outcome: Outcome, expected: dict[int, float]) -> str:
    """A word for the table."""
    if outcome.refused:
        return f"refused: {outcome.refused}"
    error = difference(outcome.losses, expected)
    bad = [
        *([f"losses differ by {error:.1e}"] if error > TOLERANCE[outcome.combination.precision] else []),
        *([] if outcome.resumed_equal else ["resuming gives other weights"]),
        *([] if outcome.adam_steps == STEPS - 2 else [f"{outcome.adam_steps} updates"]),
    ]
    return f"WRONG: {', '.join(bad)}" if bad else f"passed, largest difference {error:.1e}"


# ---- what goes wrong in each run


@contextmanager
def hardships(rank: int, world_size: int) -> Iterator[None]:
    """Steps that are not finite on the last rank, and micro-batches as no balanced plan would have them."""
    import torch
    from deepspeed.accelerator import get_accelerator

    import opt_ds.training.step as step_module
    from opt_ds.training.step import Stepper

    class Overflow(torch.autograd.Function):
        """The loss as it is, with an infinite gradient."""

        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * math.inf

    now = [-1]
    take, total_loss, make_step_plan = Stepper.take, step_module.total_loss, Plan._step_plan
    accelerator = type(get_accelerator())

    def take_noted(self: Stepper, step_plan: StepPlan, micro_batches: Any) -> Any:
        now[0] = step_plan.step
        return take(self, step_plan, micro_batches)

    def hard_loss(*arguments: Any) -> torch.Tensor:
        loss = total_loss(*arguments)
        if rank < world_size - 1:
            return loss
        return loss * math.nan if now[0] == NAN_LOSS else Overflow.apply(loss) if now[0] == INFINITE_GRADIENT else loss

    def uneven(self: Plan, step: int, samples: Any, world_size: int, num_samples: int | None = None) -> StepPlan:
        step_plan = make_step_plan(self, step, samples, world_size, num_samples)
        return replace(step_plan, micro_batches=assign(step_plan, step % 3))

    supported = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda self: True
    Stepper.take, step_module.total_loss, Plan._step_plan = take_noted, hard_loss, uneven  # type: ignore[method-assign]
    try:
        yield
    finally:
        accelerator.is_fp16_supported = supported
        Stepper.take, step_module.total_loss, Plan._step_plan = take, total_loss, make_step_plan  # type: ignore[method-assign]


def assign(step_plan: StepPlan, way: int) -> list[list[MicroBatchPlan]]:
    """The step's samples distributed otherwise.

    0: as planned. 1: all on the first rank, and every rank ends with an empty micro-batch. 2: the modality and matching
    tasks on the last rank, the others on the first.
    """
    world_size = len(step_plan.micro_batches)
    indices = np.sort(np.concatenate([m.indices for rank in step_plan.micro_batches for m in rank]))
    late = np.isin(step_plan.samples.task[indices], (MODALITY, MATCHING))
    if way == 0:
        return step_plan.micro_batches
    parts: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    if way == 1:
        parts[0] += [indices[::2], indices[1::2]]
    else:
        parts[0].append(indices[~late])
        parts[-1].append(indices[late])
    rounds = max(len(part) for part in parts) + (way == 1)
    nothing = np.empty(0, dtype=np.int64)
    return [[MicroBatchPlan(m, 0, 0.0) for m in [*part, *[nothing] * (rounds - len(part))]] for part in parts]


# ---- ranks


def run_ranks(found: list[Combination], world_size: int, store: Path, folder: Path, timeout_s: float) -> list[Outcome]:
    """Run the combinations on `world_size` processes, which are started once; each writes its outcomes as they come."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs, port = folder / f"jobs-{world_size}.json", free_port()
    jobs.write_text(json.dumps({"store": str(store), "folder": str(folder), "combinations": [asdict(c) for c in found]}))
    command, logs = ["-m", "tests.faults.matrix", str(jobs)], [folder / f"rank-{world_size}-{r}.log" for r in range(world_size)]
    processes = [
        WarmProcess(command, rank_environment(rank, world_size, port), stdout=log, stderr=log) for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world_size, [log.read_text()[-3000:] for log in logs]
    return read_outcomes(jobs)


def read_outcomes(jobs: Path) -> list[Outcome]:
    """Return what the ranks have written so far."""
    lines = [json.loads(line) for line in jobs.with_suffix(".outcomes").read_text().splitlines()]
    return [
        Outcome(Combination(**line.pop("combination")), {int(s): loss for s, loss in line.pop("losses").items()}, **line)
        for line in lines
    ]


def main(jobs: Path) -> None:
    described = json.loads(jobs.read_text())
    group = ProcessGroup(find_ranks(), 60.0)
    with open(jobs.with_suffix(".outcomes"), "w") as outcomes:
        for tree in described["combinations"]:
            print(Combination(**tree).name, flush=True)
            outcome = run(Combination(**tree), Path(described["store"]), Path(described["folder"]), group)
            if group.ranks.is_main:
                print(json.dumps(asdict(outcome)), file=outcomes, flush=True)
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
