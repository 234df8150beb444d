"""Tiny real runs for the engine's tests: a synthetic store, opt-tiny fitted to it, and the real Trainer."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from opt_ds.config import Config, load_config
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.training.distributed import RANK_VARIABLES

FITTED = (
    "model.vocab_size=200", "model.image_feature_dim=32", "model.image_num_classes=50", "model.audio_feature_dim=20",
    "model.image_codebook_size=64", "model.max_frames=16", "model.hidden_size=32", "model.ffn_size=64",
    "batch.size=12", "schedule.warmup_steps=2", "train.image_grid=0", "train.validate_samples=8",
    "train.validate_every=1000", "train.log_every=1", "checkpoint.every_steps=1000",
)  # fmt: skip


#: Without dropout and with one task: a curve that falls smoothly on the fixture `learnable`.
CURVE = (
    "model.dropout=0", "model.attention_dropout=0", "schedule.total_steps=100", "optimizer.lr=0.01",
    "tasks.sampling_weights={modality: 1}", "tasks.dir.weight=0",
)  # fmt: skip


def make_store(path: Path, num_samples: int = 60, **options: Any) -> Path:
    """A store of random numbers, written by the real writer."""
    write_synthetic_store(path, num_samples, seed=3, regions=(4, 8), frames=(16, 80), pixels=False, **options)
    return path


def tiny_config(store: Path, *settings: str) -> Config:
    """opt-tiny with the sizes of `make_store`, narrower still."""
    return load_config("opt-tiny", [*FITTED, f"data.stores=[{store}]", *settings])


def train(config: Config, output: Path, group: Any, precision: str | None = None) -> int:
    """Do what pretrain.py does after the ranks joined, and return the exit code. `precision` skips the hardware's check."""
    from opt_ds.evaluation.callbacks import EvaluationCallbacks
    from opt_ds.training import checkpoint, preflight, run_folder
    from opt_ds.training.deepspeed_config import Hardware, choose_precision
    from opt_ds.training.signals import StopRequest
    from opt_ds.training.trainer import Trainer

    stores = preflight.open_stores(config)
    run_folder.check_same_run(output, config, stores)
    hardware = Hardware.detect()
    output.mkdir(parents=True, exist_ok=True)
    resume_from = group.from_main(checkpoint.find_resumable(output))
    precision = precision or choose_precision(config, hardware)
    with StopRequest(config.train.preemption_signal) as stop:
        callbacks = EvaluationCallbacks()
        return Trainer(config, stores, output, group, hardware, precision, resume_from, stop, callbacks).train()


def hashes(output: Path, step: int) -> dict[str, str]:
    """SHA-256 of weights and moments after `step` steps."""
    folder = output / "checkpoints" / f"step-{step:08d}"
    files = json.loads((folder / "COMPLETE.json").read_text())["files"]
    return {name: files[name]["sha256"] for name in ("model.safetensors", "moments.safetensors")}


def tensors(output: Path, step: int, name: str) -> dict[str, Any]:
    """Tensors of a checkpoint's file: "model" or "moments"."""
    from safetensors.torch import load_file

    return load_file(output / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def zero_moments(output: Path, step: int) -> None:
    """Make a checkpoint forget Adam's moments, as a broken resume would."""
    import torch
    from safetensors.torch import load_file, save_file

    from opt_ds.store.files import file_sha256, write_json
    from opt_ds.training import checkpoint

    folder = output / checkpoint.FOLDER / checkpoint.folder_name(step)
    path = folder / checkpoint.MOMENTS_FILE
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)
    state = checkpoint.read_state(folder)
    files = {n: folder / n for n in (checkpoint.MODEL_FILE, checkpoint.MOMENTS_FILE, checkpoint.STATE_FILE)}
    described = {n: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for n, p in files.items()}
    write_json(folder / checkpoint.COMPLETE, {"step": state["step"], "files": described})


def losses(output: Path) -> dict[int, float]:
    """Step -> training loss, from metrics.jsonl."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment of one rank, as a launcher sets it, without the rank variables of this process."""
    own = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    if world_size == 1:
        return own
    return own | {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
