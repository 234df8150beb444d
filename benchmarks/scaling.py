"""Measure how cost grows with the size of a store, the ids of a step plan, the ranks, and the length of a sample.

    python benchmarks/scaling.py [--part store|plan|ranks|length ...] [--output scaling.json] [--figures benchmarks]

`store`: write stores of 10^3 to 10^6 synthetic samples. A new process opens one, makes its step plan and reads the
first micro-batch. Measured are seconds, and memory in excess of a process that has only imported (anonymous and
mapped).
`plan`: the step plan over 10^4 to 10^9 ids of a simulated store. Its arrays are functions of the id, so that only the
memory of the plan itself is measured.
`ranks`: the micro-batches of one step for 1 to 1,000 ranks, planned by one rank, and by the eight ranks of a node that
share their plans.
`length`: forward and backward of one packed micro-batch of a model of 4 layers x 384, samples of 64 to 512 positions,
fp32. Times are medians of the processor time of one thread, which other programs disturb less than wall-clock time.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from opt_ds.config import Config, config_from_dict  # noqa: E402
from opt_ds.data.pretraining_plan import PretrainingPlan  # noqa: E402
from opt_ds.data.shared_plans import read_plan, write_plan  # noqa: E402
from opt_ds.data.step_plan import StepPlan  # noqa: E402
from opt_ds.ops.plan_operators import plan_operators  # noqa: E402
from opt_ds.store.files import write_json  # noqa: E402
from opt_ds.store.index import INDEX_FILE, ShardFile, write_index  # noqa: E402
from opt_ds.store.reader import FeatureStore  # noqa: E402
from opt_ds.store.schema import STORE_FILE  # noqa: E402
from opt_ds.store.shards import describe_shard, write_datasets  # noqa: E402
from opt_ds.store.statistics import TRAIN_SPLIT, statistics_of, train_sums  # noqa: E402
from opt_ds.store.synthetic import write_synthetic_store  # noqa: E402
from opt_ds.tools.assumed_store import AssumedStore  # noqa: E402

SHARD = 1024
STORE_SIZES = (1_000, 10_000, 100_000, 1_000_000)
PLAN_SIZES = (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
RANKS = (1, 4, 16, 64, 256, 1000)
NODE_RANKS = 8  # ranks of a node, which share their plans
LENGTHS = (64, 128, 256, 512)
MIB = 2**20


def median_busy(run: Callable[[int], Any], repeats: int = 5) -> float:
    """Return the processor seconds of a call."""
    times = []
    for repeat in range(repeats):
        began = time.process_time()
        run(repeat)
        times.append(time.process_time() - began)
    return statistics.median(times)


# ---- store


def write_large_store(path: Path, num_samples: int) -> None:
    """Write a store of `count` small samples: copies of the first shard with different ids and groups."""
    first = min(SHARD, num_samples)
    description = write_synthetic_store(path, first, samples_per_shard=SHARD, pixels=False, num_codes_vocab=None, text_len=(3, 6),
                                        regions=(1, 2), frames=(2, 4), image_feature_dim=8, audio_feature_dim=8)  # fmt: skip
    file = ShardFile(path / description.shards[0].file)
    arrays = {name: np.asarray(file.array(name)) for name in file.names()}
    shards, counts = [description.shards[0]], np.bincount(arrays["samples/split"], minlength=2)
    for number in range(1, num_samples // SHARD):
        ids = b"".join(b"%010d" % (number * SHARD + place) for place in range(SHARD))
        arrays["samples/id"] = np.frombuffer(ids, np.uint8)
        arrays["samples/id_offsets"] = np.arange(SHARD + 1, dtype=np.int64) * 10
        arrays["samples/group"] = np.arange(SHARD, dtype=np.int64) + number * SHARD
        target = path / f"shard-{number:05d}.h5"
        write_datasets(target, arrays, compression=None)
        shards.append(describe_shard(target, arrays))
        counts += np.bincount(arrays["samples/split"], minlength=2)
    total = sum(shard.num_samples for shard in shards)
    split_counts = dict(zip(("train", "valid"), counts.tolist(), strict=True))
    sums = train_sums(
        arrays, description.split_names.index(TRAIN_SPLIT)
    )  # the sums of every shard, as their rows and splits are equal
    fields = {
        "shards": shards, "num_samples": total, "split_counts": split_counts,
        "statistics": statistics_of([sums] * len(shards), description.dims),
    }  # fmt: skip
    description = description.model_copy(update=fields).with_fingerprint()
    write_index(path, description)
    write_json(path / STORE_FILE, description.model_dump(mode="json"))


def store_config() -> Config:
    model = {"vocab_size": 200, "image_feature_dim": 8, "audio_feature_dim": 8, "image_num_classes": 50}
    return config_from_dict({"model": model, "batch": {"size": 1024}}, where="benchmark")


def resident_mib() -> tuple[float, float]:
    """Return anonymous memory, and memory mapped from files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def open_store(path: Path) -> dict[str, float]:
    """Open, plan and read in a new process."""
    from opt_ds.data.samples import SampleReader

    config = store_config()
    before, wall, busy = resident_mib(), time.perf_counter(), time.process_time()
    store = FeatureStore(path)
    plan = PretrainingPlan(config, [store])
    step_plan = plan.step(0)
    reader = SampleReader(config, [store])
    samples = [reader.read(step_plan.samples, int(index)) for index in step_plan.micro_batches[0][0].indices]
    assert samples
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    after = resident_mib()
    return {"wall_s": wall, "busy_s": busy, "anonymous_mib": after[0] - before[0], "mapped_mib": after[1] - before[1],
            "open_files": len(os.listdir("/proc/self/fd"))}  # fmt: skip


def measure_stores(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for size in STORE_SIZES:
        path = folder / f"store-{size}"
        write_large_store(path, size)
        for indexed in (True, False):
            if not indexed:
                (path / INDEX_FILE).unlink()
            runs = [json.loads(_again("--open", str(path))) for _ in range(3)]
            medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rows.append({"samples": size, "index": indexed, **medians})
            print(rows[-1], flush=True)
    return rows


def _again(*arguments: str) -> str:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


# ---- plan and ranks


class _Function:
    """Acts like an array whose element i is f(i)."""

    def __init__(self, size: int, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self._size, self._function = size, function

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, key: Any) -> Any:
        index, column = key if isinstance(key, tuple) else (key, slice(None))
        if isinstance(index, slice):
            index = np.arange(*index.indices(self._size), dtype=np.int64)
        values = self._function(np.asarray(index, np.int64))
        return values if isinstance(column, slice) else values[:, column]


class SimulatedStore(AssumedStore):
    """Every sample has its own text, image, audio and group. 99 of 100 are in the train split."""

    def __init__(self, config: Config, size: int) -> None:
        super().__init__(config.model, 40, 36, 65)
        self.num_samples = size
        self.rows: Any = _Function(size, lambda index: np.repeat(index[:, None], 3, 1))
        self.groups: Any = _Function(size, lambda index: index)

    def split_samples(self, split: str) -> Any:
        train = self.num_samples * 99 // 100
        if split == "train":
            return _Function(train, lambda index: index)
        return _Function(self.num_samples - train, lambda index: index + train)

    def _spread(self, mean: int) -> Any:
        return _Function(self.num_samples, lambda row: mean // 2 + row * 2654435761 % (mean + 1))

    def lengths(self, modality: str) -> Any:
        return self._spread({"text": 40, "image": 36, "audio": 65}[modality])


def plan_of(size: int) -> dict[str, float]:
    """Make the plan in a new process, to measure its peak memory."""
    config = config_from_dict({}, where="benchmark")
    plan_operators()  # load torch, as every run does
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    plan = PretrainingPlan(config, [cast(FeatureStore, SimulatedStore(config, size))])
    made = time.process_time() - began
    step = median_busy(lambda repeat: plan.step(1000 + repeat * 7, 4))
    positions = np.arange(10_240, dtype=np.int64)
    sampler = median_busy(lambda repeat: plan._samples_at(positions + repeat * 10_240))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    return {"ids": size, "start_s": made, "step_s": step, "sampler_s": sampler, "peak_growth_mib": grown}


def measure_ranks() -> list[dict[str, Any]]:
    rows = []
    for batch in (10_240, 102_400):
        config = config_from_dict({"batch": {"size": batch}}, where="benchmark")
        plan = PretrainingPlan(config, [cast(FeatureStore, SimulatedStore(config, 10**8))])
        for ranks in RANKS:
            step_plan = plan.step(3, ranks)
            seconds = median_busy(partial(plan.step, world_size=ranks), 3)
            row = {
                "batch": batch,
                "ranks": ranks,
                "step_s": seconds,
                "balance": step_plan.load_imbalance,
                "packing_efficiency": step_plan.packing_efficiency,
            }
            left, read = sharing_seconds(step_plan)
            shared = (seconds + left + (NODE_RANKS - 1) * read) / NODE_RANKS
            rows.append({**row, "node_step_s": shared, "micro_batches": len(step_plan.micro_batches[0])})
            print(rows[-1], flush=True)
    return rows


def sharing_seconds(step_plan: StepPlan) -> tuple[float, float]:
    """Return the processor seconds of writing a plan for the other ranks of a node, and of reading it."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "plan"
        left = median_busy(lambda _: write_plan(path, step_plan, "key"))
        return left, median_busy(lambda _: read_plan(path, step_plan.step, "key"))


# ---- length


def measure_lengths() -> list[dict[str, Any]]:
    import torch

    from opt_ds.data.batch import Packer
    from opt_ds.data.samples import SampleReader
    from opt_ds.model.opt import OPT
    from opt_ds.tasks.base import total_loss

    torch.set_num_threads(1)
    rows = []
    for length in LENGTHS:
        text, frames = length // 4, length // 2
        model = {"hidden_size": 384, "num_heads": 6, "ffn_size": 1536, "num_layers": 4, "text_decoder_layers": 2,
                 "image_decoder_layers": 2, "dropout": 0.0, "attention_dropout": 0.0, "max_text_tokens": 256, "max_frames": 512,
                 "vocab_size": 8192, "image_codebook_size": 1024}  # fmt: skip
        count = 2048 // length
        config = config_from_dict(
            {"model": model, "tasks": {"sampling_weights": {"mlm": 1.0}}, "batch": {"size": count}}, where="benchmark"
        )
        store: Any = AssumedStore(config.model, text, length - text - frames - 2, frames)
        store._spread = lambda modality, s=store: np.full(
            4096, s._means[modality], np.int32
        )  # all samples have this length
        step_plan = PretrainingPlan(config, [store]).step(0)
        reader, packer = SampleReader(config, [store]), Packer(config, store.description.tokenizer)
        batch = packer.pack([reader.read(step_plan.samples, index) for index in range(count)])
        network = OPT(config.model, config.tasks)

        def run(
            _: int, network: Any = network, batch: Any = batch, step_plan: Any = step_plan, config: Config = config
        ) -> None:
            total_loss(network(batch), step_plan.divisors, config.tasks, 1).backward()
            network.zero_grad()

        run(0)
        positions = batch.inputs.sequences.total
        rows.append(
            {"length": positions // count, "positions": positions, "us_a_position": median_busy(run) / positions * 1e6}
        )
        print(rows[-1], flush=True)
    return rows


# ---- all


Curve = tuple[list[float], list[float]]


def draw(path: Path, title: str, x_label: str, y_label: str, curves: dict[str, Curve], log_y: bool) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        axes.plot(x, y, marker="o", label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log")
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=80, format="png", metadata={"Software": None})


def column(rows: list[dict[str, Any]], x: str, y: str, **where: Any) -> Curve:
    chosen = [row for row in rows if all(row[key] == value for key, value in where.items())]
    return [row[x] for row in chosen], [row[y] for row in chosen]


def draw_all(found: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if rows := found.get("store"):
        curves = {
            name: column(rows, "samples", "wall_s", index=index)
            for name, index in (("index", True), ("no index", False))
        }
        draw(
            folder / "scaling-store.png",
            "open, plan, first micro-batch",
            "samples of the store",
            "seconds",
            curves,
            True,
        )
    if rows := found.get("plan"):
        curves = {name: column(rows, "ids", key) for name, key in (("start", "start_s"), ("a step of 10,240", "step_s"),
                                                                   ("its sampler", "sampler_s"))}  # fmt: skip
        draw(folder / "scaling-plan.png", "step plan", "ids", "processor seconds", curves, False)
    if rows := found.get("ranks"):
        curves = {f"batch {size:,}": column(rows, "ranks", "balance", batch=size) for size in (10_240, 102_400)}
        draw(folder / "scaling-ranks.png", "load of the busiest rank over the mean", "ranks", "ratio", curves, False)
    if rows := found.get("length"):
        curves = {"4 x 384, fp32": column(rows, "length", "us_a_position")}
        draw(
            folder / "scaling-length.png",
            "forward and backward",
            "positions of a sample",
            "µs per position",
            curves,
            False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=("store", "plan", "ranks", "length"), help="default: all")
    parser.add_argument(
        "--output", type=Path, default=Path("scaling.json"), help="JSON file; parts that it already holds are kept"
    )
    parser.add_argument("--figures", type=Path, default=Path(__file__).parent)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open or options.plan:
        print(json.dumps(open_store(options.open) if options.open else plan_of(options.plan)))
        return

    found = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    for part in options.part or ("plan", "ranks", "length", "store"):
        if part == "store":
            with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
                found[part] = measure_stores(Path(folder))
        elif part == "plan":
            found[part] = [json.loads(_again("--plan", str(size))) for size in PLAN_SIZES]
            print("\n".join(map(str, found[part])), flush=True)
        else:
            found[part] = measure_ranks() if part == "ranks" else measure_lengths()
        found["machine"] = {"processors": os.cpu_count(), "load_average": os.getloadavg()[0]}
        write_json(options.output, found)
    draw_all(found, options.figures)


if __name__ == "__main__":
    main()
