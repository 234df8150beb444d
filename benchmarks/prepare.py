"""Measure the preparation pipeline: samples per second and the load of the processors, for 1 and 2 worker processes.

    python benchmarks/prepare.py [--samples 300] [--workers 1 --workers 2] [--repeats 3] [--output prepare.json]

The corpus is seeded noise: JPEG images of 640 x 480, WAV files of 3 s at 44.1 kHz, captions of ten words. `prepare`
runs in a new process. Its processor time and that of its workers are added. `busy` is that time divided by wall-clock
time and workers. The main process (tokens, HDF5, checksums) adds to it, so more than 100 % is possible. Loading the
extractors is included; `steady` excludes the time until the first tenth of the files was extracted.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from opt_ds.store.files import write_json  # noqa: E402


def write_corpus(folder: Path, num_samples: int) -> Path:
    """Write images, audio and a manifest."""
    import soundfile
    from PIL import Image

    random = np.random.default_rng(0)
    words = [f"word{index}" for index in range(200)]
    lines = []
    for index in range(num_samples):
        coarse = Image.fromarray(
            random.integers(0, 256, (30, 40, 3), "uint8")
        )  # noise per pixel would not be a typical JPEG
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
        soundfile.write(folder / f"{index}.wav", 0.1 * random.standard_normal(3 * 44_100), 44_100)
        text = " ".join(random.choice(words, 10))
        lines.append(json.dumps({"id": str(index), "image": f"{index}.jpg", "audio": f"{index}.wav", "text": text}))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(lines), encoding="utf-8")
    return manifest


def prepare_once(manifest: Path, output: Path, workers: int) -> dict[str, float]:
    """Prepare in a new process, and return when each fraction of the files was done."""
    from opt_ds.ingest import PrepareSettings, pipeline, prepare

    marks: list[tuple[float, int]] = []

    class Progress(pipeline.tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> bool | None:
            marks.append((time.perf_counter(), int(n or 0)))
            return super().update(n)

    pipeline.tqdm = Progress  # type: ignore[misc]
    began = time.perf_counter()
    settings = PrepareSettings(samples_per_shard=100, vocab_size=600)
    prepare(manifest, output, settings, workers=workers, device="cpu")
    wall = time.perf_counter() - began
    busy = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    files = np.cumsum([count for _, count in marks])
    first = int(np.searchsorted(files, files[-1] / 10))
    steady = (files[-1] - files[first]) / (marks[-1][0] - marks[first][0]) / 2  # two files per sample
    return {"wall_s": wall, "busy_s": busy, "busy": busy / wall / workers, "steady_samples_per_s": float(steady)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--workers", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("prepare.json"))
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        manifest, output, workers = options.once
        print(json.dumps(prepare_once(Path(manifest), Path(output), int(workers))))
        return

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        manifest = write_corpus(folder / "corpus", options.samples)
        runs: dict[int, list[dict[str, float]]] = {workers: [] for workers in options.workers or (1, 2)}
        for _ in range(options.repeats):
            for workers, done in runs.items():
                command = [sys.executable, __file__, "--once", str(manifest), str(folder / "store"), str(workers)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                done.append(json.loads(out.splitlines()[-1]))
                shutil.rmtree(folder / "store")
        for workers, done in runs.items():
            row = {key: statistics.median(run[key] for run in done) for key in done[0]}
            rows.append({"workers": workers, "samples": options.samples, "samples_per_s": options.samples / row["wall_s"],
                         "cpu_ms_per_sample": row["busy_s"] / options.samples * 1e3, **row})  # fmt: skip
    machine = {"processors": os.cpu_count(), "load_average": os.getloadavg()[0]}
    write_json(options.output, {"rows": rows, **machine})
    print("| workers | samples/s | samples/s, steady | processor time per sample | busy |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['workers']} | {row['samples_per_s']:.1f} | {row['steady_samples_per_s']:.1f} | "
              f"{row['cpu_ms_per_sample']:.0f} ms | {row['busy']:.0%} |")  # fmt: skip
    print(json.dumps(machine))


if __name__ == "__main__":
    main()
