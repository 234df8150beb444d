"""Comparison of a complete optimiser step of opt_ds (all tasks, DeepSpeed) with the same step in a plain loop."""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import interleaved, matmul, median_ratio
from benchmarks.step.accumulator import Accumulator
from benchmarks.step.compare import DTYPES
from benchmarks.step.data import Mix, MixData, packed_micro_batches
from opt_ds.data.micro_batches import MicroBatchPlan
from opt_ds.data.step_plan import StepPlan
from opt_ds.model.opt import OPT
from opt_ds.ops import backend
from opt_ds.tasks.base import total_loss
from opt_ds.training.deepspeed_config import Hardware, Precision
from opt_ds.training.distributed import ProcessGroup, find_ranks
from opt_ds.training.signals import StopRequest


@cache
def this_rank() -> ProcessGroup:
    """Return this process as the only rank. It joins once, because DeepSpeed keeps the first group that it sees."""
    return ProcessGroup(find_ranks())


def engine_data(
    folder: Path, mix: Mix, pool: int, micro_batches: int, settings: list[str], device: torch.device
) -> MixData:
    """Return the samples of one step of all tasks. The store has samples for `pool` micro-batches."""
    return MixData(folder, mix, ["guard.spike_zscore=0", *settings], device, pool, micro_batches)


def compare_engine(data: MixData, precision: Precision, repeats: int, micro_batches: int, clock: str) -> dict[str, Any]:
    """Compare a complete optimiser step of all tasks under DeepSpeed with the same in a plain loop.

    Args:
        data: The samples of the step.
        precision: "fp32" or "bf16".
        repeats: Number of timed steps, all with the same samples.
        micro_batches: Micro-batches per step.
        clock: A key of `benchmarks.measure.CLOCKS`.

    Returns:
        Seconds, tokens per second and utilisation of the loop and of the engine, and the ratio of their times.
    """
    from opt_ds.training.trainer import Trainer

    indices = packed_micro_batches(np.arange(len(data.lengths)), data.lengths, micro_batches)
    batches = [data.pack(own) for own in indices]
    config = data.config
    torch.manual_seed(1)
    loop = Accumulator(OPT(config.model, config.tasks).to(data.device), config, DTYPES[precision])

    def loop_step(_: int) -> float:
        total = torch.zeros((), device=data.device)
        for k, batch in enumerate(batches):
            backend.seed_dropout(1, 0, 0, k)
            loss = total_loss(loop.model(batch), data.step_plan.divisors, config.tasks, 1)
            loop.backward(loss)
            total += loss.detach()
        loop.update()
        return float(total)

    with tempfile.TemporaryDirectory() as output, StopRequest("SIGUSR1") as stop:
        trainer = Trainer(config, data.stores, Path(output), this_rank(), Hardware.detect(), precision, None, stop)
        trainer.engine.train()
        step_plan = _with_micro_batches(data.step_plan, indices, data.lengths)

        def engine_step(_: int) -> None:
            trainer.stepper.take(step_plan, iter(batches))

        product, product_flops = matmul(DTYPES[precision], data.device)
        calls: dict[str, Callable[[int], object]] = {"loop": loop_step, "matmul": product, "engine": engine_step}
        seconds = interleaved(calls, repeats, clock, data.device)
        trainer.close()
    peaks = [product_flops / s for s in seconds["matmul"]]
    flops = data.flops(np.arange(len(data.lengths)))
    positions = sum(batch.num_tokens for batch in batches)
    return {
        "peak_gflops": statistics.median(peaks) / 1e9,
        "positions": positions,
        "micro_batches": len(batches),
        "engine_over_loop": median_ratio(seconds["engine"], seconds["loop"]),
        **{
            name: {
                "seconds_per_step": statistics.median(seconds[name]),
                "tokens_per_s": positions / statistics.median(seconds[name]),
                "utilisation": statistics.median(
                    flops / s / peak for s, peak in zip(seconds[name], peaks, strict=True)
                ),
                "seconds": seconds[name],
            }
            for name in ("loop", "engine")
        },
    }


def _with_micro_batches(step_plan: StepPlan, indices: list[np.ndarray], lengths: np.ndarray) -> StepPlan:
    totals = [int(lengths[own].sum()) for own in indices]
    micro_batches = [MicroBatchPlan(own, total, float(total)) for own, total in zip(indices, totals, strict=True)]
    return dataclasses.replace(step_plan, micro_batches=[micro_batches])
