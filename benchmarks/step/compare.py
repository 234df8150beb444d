"""Comparison of opt_ds with the baselines in masked language modelling: same work, same losses, then the time."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import interleaved, matmul, ratios, summary
from benchmarks.step.data import POOL, Mix, MixData
from benchmarks.step.methods import BASELINES, OURS, Method, OptDs
from benchmarks.step.work import check_same_work
from opt_ds.model.opt import OPT
from opt_ds.ops import backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of the losses of equal weights, relative
CHECKED = 2  # samples of the checks of the losses
CHECK_UPDATES = 3


def compare_methods(
    data: MixData, precision: str, baselines: Sequence[str], repeats: int, micro_batches: int, clock: str = "wall"
) -> dict[str, Any]:
    """Measure optimiser steps of masked language modelling by opt_ds and the baselines.

    The methods take turns, micro-batch by micro-batch. All train on the same samples in a step, and on other samples in
    the next. Their models start from the same weights.

    Args:
        data: The samples. Their tasks must be masked language modelling only.
        precision: A key of DTYPES.
        baselines: Keys of BASELINES.
        repeats: Number of timed steps.
        micro_batches: Micro-batches per step.
        clock: A key of `benchmarks.measure.CLOCKS`.

    Returns:
        The work and the losses of each method, its seconds per step, and its rates.

    Raises:
        ValueError: The methods differ in their work or in their losses, or one does not learn.
    """
    methods = build_methods(data, precision, baselines, 1 + repeats, micro_batches)
    losses = check_losses(methods, data, precision)
    work = {name: method.counted_step() for name, method in methods.items()}
    check_same_work(work)
    contents = [{name: method.contents(step) for name, method in methods.items()} for step in range(1 + repeats)]
    for of_step in contents:
        check_same_work(of_step, ("samples", "tokens", "masked"))
    seconds, peaks = _seconds(methods, precision, repeats, micro_batches, clock)
    tokens = [of_step[OURS].tokens for of_step in contents[1:]]
    return {
        "peak_gflops": statistics.median(peaks) / 1e9,
        "micro_batches": micro_batches,
        "counts_all_products": backend.library("attention") is None,
        "methods": {
            name: {
                "title": method.title,
                "work": asdict(work[name]),
                "losses": losses[name],
                "seconds_per_step": seconds[name],
                "tokens_per_s": summary([count / s for count, s in zip(tokens, seconds[name], strict=True)]),
                "utilisation": statistics.median(
                    _needed(data, method, step + 1) / s / peak
                    for step, (s, peak) in enumerate(zip(seconds[name], peaks, strict=True))
                ),
                "opt_ds_faster_by": summary(ratios(seconds[name], seconds[OURS])),
            }
            for name, method in methods.items()
        },
    }


def mlm_data(
    folder: Path, mix: Mix, repeats: int, micro_batches: int, settings: Sequence[str], device: torch.device
) -> MixData:
    """Return the samples of `repeats` timed steps and one untimed step, all for masked language modelling."""
    return MixData(folder, mix, ["tasks.sampling_weights={mlm: 1}", *settings], device, max(POOL, (1 + repeats) * micro_batches))


def build_methods(
    data: MixData, precision: str, baselines: Sequence[str], steps: int, micro_batches: int
) -> dict[str, Method]:
    """Return name -> method, opt_ds last. All models have the same initial weights."""
    torch.manual_seed(1)
    opt, samples = OPT(data.config.model, data.config.tasks), data.steps(steps, micro_batches)
    kinds: dict[str, type[Method]] = {name: BASELINES[name] for name in baselines} | {OURS: OptDs}
    return {name: kind(data, DTYPES[precision], opt, samples) for name, kind in kinds.items()}


def check_losses(methods: Mapping[str, Method], data: MixData, precision: str) -> dict[str, list[float]]:
    """Check that all methods compute the same loss, and learn. Return each one's loss before and after a few updates.

    The losses are those of two samples, without dropout.

    Raise ValueError if the losses before differ, are not near ln(vocabulary), or do not fall.
    """
    batch = data.pack(next(iter(methods.values())).samples[0].indices[:CHECKED])
    before = {name: method.mean_loss(batch) for name, method in methods.items()}
    if max(before.values()) - min(before.values()) > TOLERANCE[precision] * max(before.values()):
        raise ValueError(f"the methods do not compute the same loss from the same weights: {before}")
    expected = math.log(data.config.model.vocab_size)
    if not all(abs(loss - expected) < 0.2 * expected for loss in before.values()):
        raise ValueError(f"the losses of untrained models are not near {expected:.2f}: {before}")
    after = {}
    for name, method in methods.items():
        for _ in range(CHECK_UPDATES):
            method.trained.backward(method.summed_loss(batch) / method.masked[0])
            method.trained.update()
        after[name] = method.mean_loss(batch)
    if not all(after[name] < before[name] for name in methods):
        raise ValueError(f"training on two samples does not reduce their loss: before {before}, after {after}")
    return {name: [before[name], after[name]] for name in methods}


def _seconds(
    methods: Mapping[str, Method], precision: str, repeats: int, micro_batches: int, clock: str
) -> tuple[dict[str, list[float]], list[float]]:
    """Return each method's seconds per step, and the rate of a large matrix product in the same turns, per step."""
    data = next(iter(methods.values())).data
    product, product_flops = matmul(DTYPES[precision], data.device)

    def micro_batch(method: Method, turn: int) -> None:
        if turn >= 0:  # the methods are warm
            method.micro_batch(1 + turn // micro_batches, turn % micro_batches)

    def update(method: Method, turn: int) -> None:
        if turn >= 0 and (turn + 1) % micro_batches == 0:
            method.trained.update()

    calls: dict[str, Callable[[int], object]] = {name: partial(micro_batch, method) for name, method in methods.items()}
    calls |= {"matmul": product} | {f"{name} update": partial(update, method) for name, method in methods.items()}
    turns = interleaved(calls, repeats * micro_batches, clock, data.device)

    def per_step(name: str) -> list[float]:
        own = turns[name]
        return [sum(own[first : first + micro_batches]) for first in range(0, len(own), micro_batches)]

    seconds = {
        name: [s + u for s, u in zip(per_step(name), per_step(f"{name} update"), strict=True)] for name in methods
    }
    return seconds, [micro_batches * product_flops / s for s in per_step("matmul")]


def _needed(data: MixData, method: Method, step: int) -> float:
    """Return the needed operations of a step, which are the same for all methods."""
    return data.flops(method.samples[step].indices)

