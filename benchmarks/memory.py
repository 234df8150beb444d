"""Measure peak memory and time per sample against the batch size: accumulation must cost neither.

    python benchmarks/memory.py [--sizes 256 1024 10240] [--stages 1] [--precision fp32] [--repeats 5] [--output memory.json]

Every figure is from a run of `opt_ds/pretrain.py` (one rank) on a synthetic store. The sizes take turns. `peak` is the
peak memory of the process up to the last step (on a GPU: of tensors), before validation and checkpoint. `ms per sample`
is the median over the steps after the first. All runs take about the same number of samples.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.measure import machine, print_table, write_result  # noqa: E402
from opt_ds.config import load_config  # noqa: E402
from opt_ds.store.synthetic import write_synthetic_store  # noqa: E402


def run(config: str, store: Path, output: Path, size: int, steps: int, settings: list[str]) -> tuple[float, float]:
    """Return peak GiB and milliseconds per sample of one run."""
    own = [f"data.stores=[{store}]", f"batch.size={size}", f"train.max_steps={steps}", "train.log_every=1",
           "train.validate_samples=16", "train.image_grid=0", *settings]  # fmt: skip
    command = [sys.executable, "opt_ds/pretrain.py", "--config", config, "--output", str(output)]
    done = subprocess.run([*command, *(part for setting in own for part in ("--set", setting))], cwd=ROOT, capture_output=True,
                          text=True, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"batch.size={size}: the run failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    log = [line for line in lines if line["kind"] == "train"]
    return log[-1]["memory/peak_gib"], statistics.median(1e3 / line["speed/samples_per_s"] for line in log[1:] or log)


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak memory and time per sample against the batch size.")
    parser.add_argument("--config", default="opt-tiny")
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 1024, 10240])
    parser.add_argument("--stages", nargs="+", type=int, choices=[0, 1, 2, 3], default=[1])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4000, help="number of samples of the synthetic store")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY.PATH=VALUE", dest="settings")
    parser.add_argument("--output", type=Path, help="JSON file for the figures, written after every run")
    arguments = parser.parse_args()
    model = load_config(arguments.config).model
    result: dict[str, Any] = {
        "machine": machine(),
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "runs": [],
    }
    most = max(arguments.sizes)
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "store"
        write_synthetic_store(
            store, arguments.samples, image_feature_dim=model.image_feature_dim, audio_feature_dim=model.audio_feature_dim,
            image_num_classes=model.image_num_classes, vocab_size=model.vocab_size, num_codes_vocab=model.image_codebook_size,
            text_len=(3, model.max_text_tokens), regions=(4, model.max_regions), frames=(8, model.max_frames), pixels=False,
        )  # fmt: skip
        for repeat in range(arguments.repeats):
            for stage in arguments.stages:
                for size in arguments.sizes:
                    steps = max(2, min(most // size, 24))
                    settings = [f"zero.stage={stage}", f"precision={arguments.precision}", *arguments.settings]
                    output = Path(name) / f"{repeat}-{stage}-{size}"
                    peak, milliseconds = run(arguments.config, store, output, size, steps, settings)
                    result["runs"].append({"stage": stage, "size": size, "peak_gib": peak, "ms_a_sample": milliseconds})
                    print(
                        f"stage {stage}, {size} samples: {peak:.3f} GiB, {milliseconds:.3f} ms per sample", flush=True
                    )
                    write_result(arguments.output, result)
    relative = "relative to the smallest"
    print_table(["ZeRO stage", "samples per step", "peak, GiB", relative, "ms per sample", relative],
                rows(result["runs"], arguments.stages, arguments.sizes))  # fmt: skip
    return 0


def rows(runs: list[dict[str, Any]], stages: list[int], sizes: list[int]) -> list[list[str]]:
    """Return medians over the repeats. Ratios are medians of the ratios within a repeat."""
    made = []
    for stage in stages:
        by_size = {size: [r for r in runs if (r["stage"], r["size"]) == (stage, size)] for size in sizes}
        for size in sizes:
            cells = [str(stage), f"{size:,}"]
            for key, digits in (("peak_gib", 2), ("ms_a_sample", 2)):
                own, least = ([r[key] for r in by_size[which]] for which in (size, min(sizes)))
                ratio = statistics.median(a / b for a, b in zip(own, least, strict=True))
                cells += [f"{statistics.median(own):.{digits}f}", f"{ratio:.3f}"]
            made.append(cells)
    return made


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    raise SystemExit(main())
