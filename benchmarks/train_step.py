"""Measure a training step on this machine: opt_ds, baselines, and the loop of opt_ds without DeepSpeed.

    python benchmarks/train_step.py [--layers 4 12 24] [--precision fp32 bf16] [--mix long emoji] [--output FILE.json]

Part `baselines` compares optimiser steps of masked language modelling. All models have `opt-base`'s width (768, 12
heads, FFN 3,072), a vocabulary of 30,522, dropout 0.1, the same embedders of regions and frames, and the same initial
weights:

    ours       packed; the last layer and the vocabulary's scores at masked WordPieces only
    hf         transformers' BERT without padding, in the same micro-batches; scores at masked WordPieces only
    uniter     transformers' BERT as UNITER trains: buckets of similar length, padded; scores at masked WordPieces only
    hf_padded  transformers' BERT on random samples, padded; scores at masked WordPieces only (`--baseline hf_padded`)

They take turns micro-batch by micro-batch. In a step all train on the same samples with the same masks, accumulate
gradients in fp32, clip them and run one fused AdamW. Every step has other samples. An untimed step warms each method up
and counts its work. The script stops if the counts differ, if equal weights do not give equal losses, or if a method
does not learn.

Part `engine` compares a complete optimiser step of opt_ds (all tasks, DeepSpeed stage 1, one rank) with `loop`, the
same model and micro-batches in a plain PyTorch loop.

Tokens are positions with content. Utilisation is the number of needed operations (opt_ds/data/flops.py: without
padding and unused positions), relative to a large matrix product timed in the same turns. `--times` enlarges the
micro-batches, so that they occupy a GPU. `--backend` chooses the operators there.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from benchmarks.measure import CLOCKS, machine, print_table, write_result  # noqa: E402
from benchmarks.step.compare import DTYPES, compare_methods, mlm_data  # noqa: E402
from benchmarks.step.data import MIXES, POOL, Mix  # noqa: E402
from benchmarks.step.methods import BASELINES, OURS  # noqa: E402
from opt_ds.errors import UserError  # noqa: E402
from opt_ds.ops import backend  # noqa: E402
from opt_ds.training.host_memory import keep_few_primitives, keep_freed_memory  # noqa: E402

PARTS = ("baselines", "engine")
FORMER_PARTS = {"peers": "baselines"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""

    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{text} is less than 1")
        return number

    parser = argparse.ArgumentParser(
        description="Time of a training step: opt_ds, baselines, and the overhead of DeepSpeed."
    )
    parser.add_argument("--layers", nargs="+", type=positive, default=[12], help="numbers of layers. Default: 12")
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--mix", nargs="+", choices=list(MIXES), default=list(MIXES))
    parser.add_argument(
        "--part", nargs="+", type=lambda name: FORMER_PARTS.get(name, name), choices=PARTS, default=list(PARTS),
        help="baselines (formerly peers), engine. Default: both",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", nargs="+", choices=list(BASELINES), default=["hf", "uniter"], help="Default: hf uniter"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="number of timed steps. Default: 5")
    parser.add_argument("--micro-batches", type=positive, default=4, help="micro-batches per step. Default: 4")
    parser.add_argument("--samples", type=positive, help="samples per micro-batch. Default: those of the mix")
    parser.add_argument("--times", type=positive, default=1, help="factor on the number of samples per micro-batch")
    parser.add_argument("--threads", type=positive, help="number of threads. Default: PyTorch's")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="wall, or cpu (with --threads 1) if other programs use the cores",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", default="auto", help="backend of the operators: auto, fused or torch")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY.PATH=VALUE", dest="settings")
    parser.add_argument("--output", type=Path, help="JSON file for the figures, written after every part")
    return parser.parse_args(arguments)


def measure(
    folder: Path, mix: Mix, layers: int, precision: Any, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Return part -> figures of one mix, number of layers and precision. `folder` is the store of the mix."""
    settings = [f"model.num_layers={layers}", f"ops.backend={options.backend}", *options.settings]
    repeats, micro_batches = options.repeats, options.micro_batches
    found: dict[str, Any] = {}
    if "baselines" in options.part:
        data = mlm_data(folder, mix, repeats, micro_batches, settings, device)
        found["baselines"] = compare_methods(
            data, precision, options.baseline, repeats, micro_batches, options.clock
        )
    if "engine" in options.part:
        from benchmarks.step.engine import compare_engine, engine_data

        pool = max(POOL, (1 + repeats) * micro_batches)
        data = engine_data(folder, mix, pool, micro_batches, settings, device)
        found["engine"] = compare_engine(data, precision, repeats, micro_batches, options.clock)
    return found


def report_baselines(heading: str, figures: dict[str, Any]) -> None:
    """Print the work of the methods and their speed."""
    methods = figures["methods"].values()
    print(f"\n{heading}, masked language modelling; matmul {figures['peak_gflops']:.0f} GFLOP/s\n")
    print(f"Work of one step of {figures['micro_batches']} micro-batches (counted in the untimed step):\n")
    print_table(
        ["", "samples", "tokens", "positions with padding", "masked", "vocabulary rows scored", "TFLOP of products",
         "parameters", "updates", "loss of two samples: untrained, after 3 updates"],
        [
            [m["title"], *(f"{m['work'][name]:,}" for name in ("samples", "tokens", "positions", "masked", "scored")),
             f"{m['work']['flops'] / 1e12:.3f}" if figures["counts_all_products"] else "not counted in kernels",
             f"{m['work']['parameters']:,}", f"{m['work']['updates']}", "{:.3f}, {:.3f}".format(*m["losses"])]
            for m in methods
        ],
    )  # fmt: skip
    print_table(
        ["", "tokens/s: median", "slowest–fastest", "content of the positions",
         "needed operations over the matmul peak", "opt_ds is faster by: median", "range"],
        [
            [m["title"], f"{m['tokens_per_s']['median']:.0f}",
             f"{m['tokens_per_s']['min']:.0f}–{m['tokens_per_s']['max']:.0f}",
             f"{m['work']['tokens'] / m['work']['positions']:.0%}", f"{m['utilisation']:.0%}",
             *(["", ""] if key == OURS else
               [f"{m['opt_ds_faster_by']['median']:.2f}",
                f"{m['opt_ds_faster_by']['min']:.2f}–{m['opt_ds_faster_by']['max']:.2f}"])]
            for key, m in figures["methods"].items()
        ],
    )  # fmt: skip


def report_engine(heading: str, figures: dict[str, Any]) -> None:
    """Print the speed of the plain loop and of DeepSpeed's engine."""
    print(
        f"\n{heading}, all tasks, {figures['positions']} positions in {figures['micro_batches']} micro-batches; "
        f"matmul {figures['peak_gflops']:.0f} GFLOP/s\n"
    )
    print_table(
        ["", "seconds per step", "tokens/s", "utilisation of the matmul peak", "time relative to the loop"],
        [
            [key, f"{figures[key]['seconds_per_step']:.2f}", f"{figures[key]['tokens_per_s']:.0f}",
             f"{figures[key]['utilisation']:.0%}", f"{figures['engine_over_loop']:.3f}" if key == "engine" else ""]
            for key in ("loop", "engine")
        ],
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the options name, and print the tables."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU: omit the option to measure on the CPU")
    most = "bf16" if "bf16" in options.precision else "fp32"
    freed, primitives = keep_freed_memory(device.type), keep_few_primitives(device.type, most)
    print(f"freed memory: {freed}; oneDNN's primitives kept: {primitives}")
    print(f"operators: {backend.choose(options.backend, device)}")
    result: dict[str, Any] = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(options).items()}}
    for name, value in result["machine"].items():
        print(f"{name}: {value}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.mix:
            samples = (options.samples or MIXES[name].samples) * options.times
            mix = replace(MIXES[name], samples=samples)
            for layers in options.layers:
                for precision in options.precision:
                    heading = f"{name} mix, {layers} layers, {precision}"
                    figures = measure(Path(folder) / name, mix, layers, precision, options, device)
                    if "baselines" in figures:
                        report_baselines(heading, figures["baselines"])
                    if "engine" in figures:
                        report_engine(heading, figures["engine"])
                    result[heading] = figures
                    write_result(options.output, result)
    if "engine" in options.part:
        from benchmarks.step.engine import this_rank

        this_rank().close()
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        print(f"train_step.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
