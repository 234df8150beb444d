"""Measure complete runs on this machine's GPUs: speed and memory, next to the estimates of `opt-ds plan`.

    python benchmarks/gpu_runs.py [--rows base large emoji] [--output FILE.json]

Every row is a run of `deepspeed opt_ds/pretrain.py` of a few steps, on a synthetic store of the samples that `opt-ds
plan` assumes (40 WordPieces, 36 regions, 65 frames on average). It has all tasks and one DeepSpeed setting of
ds_configs/. Rates are medians over the steps after the first ones. Utilisation counts needed operations only, relative
to the data sheet's peak. Memory is the peak of PyTorch's tensors, that of the driver (including context and allocator),
and the estimates of both.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.measure import print_table, write_result  # noqa: E402
from opt_ds.config import load_config  # noqa: E402
from opt_ds.store.reader import FeatureStore  # noqa: E402
from opt_ds.store.synthetic import write_synthetic_store  # noqa: E402
from opt_ds.tools.plan import Cluster, estimate_run  # noqa: E402
from opt_ds.training.hardware import known_gpu, this_machine  # noqa: E402

GIB = 2**30
STEPS, WARM = 14, 5


@dataclass(frozen=True)
class Row:
    """One run."""

    name: str
    settings: tuple[str, ...]

    def arguments(self, store: Path, batch: int, steps: int) -> list[str]:
        return [
            f"data.stores=[{store}]", f"batch.size={batch}", f"train.max_steps={steps}", "train.log_every=1",
            "train.validate_samples=64", "train.image_grid=0", *self.settings,
        ]  # fmt: skip


def rows(model: str) -> list[Row]:
    """Return the settings of ds_configs/ for a model, and one with PyTorch's kernels."""
    file = "deepspeed_config=ds_configs/{}.json"
    fp16 = file.format("zero1_fp16")
    return [
        Row(f"{model}, ZeRO 1, fp16", (fp16,)),
        Row(f"{model}, ZeRO 1, fp16, PyTorch's kernels", (fp16, "ops.backend=torch")),
        Row(f"{model}, ZeRO 1, fp16, 32,768 positions", (fp16, "batch.max_tokens=32768")),
        Row(f"{model}, ZeRO 1, bf16", (file.format("zero1_bf16"),)),
        Row(f"{model}, ZeRO 2, fp16", (file.format("zero2_fp16"), "zero.stage=2")),
        Row(f"{model}, ZeRO 2, fp16, offload",
            (file.format("zero2_offload_fp16"), "zero.stage=2", "zero.offload_optimizer=true")),
        Row(f"{model}, ZeRO 3, fp16", (file.format("zero3_fp16"), "zero.stage=3")),
    ]  # fmt: skip


class DriverMemory(threading.Thread):
    """Peak memory of the first GPU according to the driver while this runs, in GiB above the initial value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.most, self._over = self._now(), 0.0, threading.Event()

    def _now(self) -> float:
        if not torch.cuda.is_available():
            return 0.0
        command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024

    def run(self) -> None:
        while not self._over.wait(0.5):
            self.most = max(self.most, self._now() - self.before)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def __enter__(self) -> "DriverMemory":
        self.start()
        return self


def measure(model: str, row: Row, store: Path, batch: int, steps: int, num_gpus: int, output: Path) -> dict[str, Any]:
    """Run it like a user and return medians of its log. For a failed run, return its output instead."""
    arguments = [part for setting in row.arguments(store, batch, steps) for part in ("--set", setting)]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_gpus), "opt_ds/pretrain.py",
               "--config", model, "--output", str(output), *arguments]  # fmt: skip
    began = time.perf_counter()
    with DriverMemory() as memory:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    found: dict[str, Any] = {"exit": done.returncode, "wall_s": time.perf_counter() - began, "driver_gib": memory.most}
    lines = [line for line in text.splitlines() if line.strip()]
    found["said"] = lines if done.returncode else [line for line in lines if "kernel" in line or "precision" in line]
    if not done.returncode:
        log = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steady = [line for line in log if line["kind"] == "train" and line["step"] > min(WARM, steps // 2)]
        for name in ("tokens_per_s", "samples_per_s", "tflops_per_rank", "flops_utilisation", "seconds_per_step",
                     "data_wait_fraction", "packing_efficiency"):  # fmt: skip
            found[name] = statistics.median(line[f"speed/{name}"] for line in steady)
        found["allocated_gib"] = steady[-1]["memory/peak_gib"]
        found["losses"] = [line.get("train/loss") for line in log if line["kind"] == "train"]
    return found


def plan(model: str, row: Row, store: Path, batch: int, num_gpus: int) -> dict[str, float] | None:
    """Return the estimate of `opt-ds plan` for the same run, or None for an unknown GPU."""
    gpu = known_gpu(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else this_machine()
    if gpu is None:
        return None
    made = estimate_run(
        load_config(model, row.arguments(store, batch, STEPS)), Cluster(gpu, num_gpus), [FeatureStore(store)]
    )
    return {"tensors_gib": made.memory.tensors / GIB, "total_gib": made.memory.total / GIB}


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed and memory of complete runs on this machine's GPUs.")
    parser.add_argument("--models", nargs="+", default=["opt-base", "opt-large"])
    parser.add_argument("--only", nargs="+", default=[], help="only rows whose name contains one of these texts")
    parser.add_argument("--batch", type=int, default=512, help="samples per step")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--samples", type=int, default=2500, help="number of samples of the synthetic store")
    parser.add_argument("--no-plan", action="store_true", help="measure only")
    parser.add_argument("--output", type=Path, help="JSON file for the figures, written after every row")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    num_gpus = max(1, torch.cuda.device_count())
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
                              "torch": torch.__version__, "gpus": num_gpus}  # fmt: skip
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in arguments.models:
            shape = load_config(model).model
            store = folder / f"store-{shape.vocab_size}-{shape.image_feature_dim}-{shape.audio_feature_dim}"
            if not store.exists():
                write_synthetic_store(
                    store, arguments.samples, text_len=(20, 60), regions=(18, 54), frames=(33, 97), pixels=False,
                    image_feature_dim=shape.image_feature_dim, audio_feature_dim=shape.audio_feature_dim,
                    image_num_classes=shape.image_num_classes, vocab_size=shape.vocab_size,
                    num_codes_vocab=shape.image_codebook_size,
                )  # fmt: skip
            for row in rows(model):
                if arguments.only and not any(text in row.name for text in arguments.only):
                    continue
                output = folder / "run"
                found = measure(model, row, store, arguments.batch, arguments.steps, num_gpus, output)
                shutil.rmtree(output, ignore_errors=True)
                if not arguments.no_plan:
                    found["plan"] = plan(model, row, store, arguments.batch, num_gpus)
                result[row.name] = found
                table.append(cells(row.name, found))
                print(row.name, table[-1][1:], f"{found['wall_s']:.0f} s", flush=True)
                if found["exit"]:
                    print(*found["said"][-12:], sep="\n", flush=True)
                write_result(arguments.output, result)
    print_table(["run", "tokens/s", "samples/s", "TFLOP/s per GPU", "of the peak", "waiting for data", "tensors GiB (plan)",
                 "driver GiB (plan)"], table)  # fmt: skip
    return int(any(found["exit"] for found in result.values() if isinstance(found, dict)))


def cells(name: str, found: dict[str, Any]) -> list[str]:
    if found["exit"]:
        return [name, f"failed: exit {found['exit']}", "", "", "", "", "", f"{found['driver_gib']:.1f}"]
    estimate = found.get("plan")
    tensors, total = (f" ({estimate[key]:.1f})" if estimate else "" for key in ("tensors_gib", "total_gib"))
    return [name, f"{found['tokens_per_s']:,.0f}", f"{found['samples_per_s']:,.0f}", f"{found['tflops_per_rank']:.0f}",
            f"{found['flops_utilisation']:.0%}", f"{found['data_wait_fraction']:.1%}", f"{found['allocated_gib']:.1f}{tensors}",
            f"{found['driver_gib']:.1f}{total}"]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
