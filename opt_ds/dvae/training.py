"""Train the dVAE (stage 1 of the image decoder) on the images of a store, then write its codes into the store.

It is started by path (`python opt_ds/train_dvae.py --store DIR --output DIR`) or as `opt-ds train-dvae`. The loop is in
`opt_ds.dvae.trainer`.

The output directory is a run folder like every other (`opt_ds.training.run_folder`): run.json, a lock, metrics.jsonl
and tensorboard/. It also has config.json and model.safetensors (`DiscreteVAE.from_pretrained`), result.json (PSNR per
split, quality beside its controls, codebook use, time), reconstructions.png (original rows above reconstructed rows), and
checkpoints/ until the run completes.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opt_ds.config.dvae import load_dvae_config, preset_of_file
from opt_ds.devices import choose_device
from opt_ds.dvae.codes import CodeExtractor, read_pixels, split_image_rows, write_missing_codes
from opt_ds.dvae.model import DiscreteVAE, DVAEConfig
from opt_ds.dvae.quality import quality_lines
from opt_ds.dvae.trainer import RESULT_FILE, DVAERun, DVAETrainer, Hardware
from opt_ds.errors import UserError
from opt_ds.former_names import DVAE_RESULT, current_fields
from opt_ds.ops.keyed import permute
from opt_ds.store.foreign import read_json_object
from opt_ds.store.reader import FeatureStore
from opt_ds.store.trainable import split_problems
from opt_ds.store.verify import open_store
from opt_ds.training import run_folder
from opt_ds.training.host_memory import keep_freed_memory

_LOG = logging.getLogger(__name__)
# With fewer images than this, a codebook of 8,192 has fewer than about 150 patches per code.
MIN_IMAGES_FOR_BASE = 20_000
#: Former keys of what run.json records -> their names.
_FORMER_KEYS = {
    "num_pictures": "num_images",
    "pictures_sha256": "images_sha256",
    **{f"config.{former}": f"config.{key}" for former, key in DVAEConfig.renamed.items()},
}
#: Settings that older runs do not record, with the value that those runs had.
_ADDED = {f"config.{key}": 0 for key in ("l1_weight", "coarse_weight", "max_shift")}


def train_dvae(
    store_path: Path,
    output: Path,
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    settings: tuple[str, ...] = (),
    steps: int | None = None,
    seed: int = 1,
    device: str = "auto",
    precision: str = "auto",
    train_split: str = "train",
    checkpoint_every: int = 200,
    write_codes: bool = True,
) -> dict[str, Any]:
    """Train a dVAE in `output`, or complete its training, and write the codes into the store.

    Args:
        store_path: Feature store with pixels.
        output: Run folder. An existing run with the same settings is resumed.
        preset: Preset to start from. None: that of the configuration file, or one that fits the size of the store.
        config_file: YAML file with settings.
        settings: Overrides, "key=value".
        steps: Number of training steps. None: that of the configuration.
        seed: Seed of all randomness.
        device: "auto", "cpu" or "cuda".
        precision: "auto", "fp32" or "bf16".
        train_split: Split to train on.
        checkpoint_every: Steps between checkpoints.
        write_codes: Write codes and dVAE into the store.

    Returns:
        The content of result.json.

    Raises:
        UserError: The store is missing or has no pixels, a preset or key is unknown, or `output` belongs to another
            run.
        TrainingStoppedError: A signal or the time limit stopped the run. A checkpoint has been saved.
    """
    store = open_store(store_path, with_dvae=False)
    if not store.has_pixels:
        raise UserError(f"{store_path}: the store has no pixels (image/pixels): prepare it with --pixels")
    rows = split_image_rows(store, train_split)
    if not len(rows):
        raise UserError(f'{store_path}: split "{train_split}" has no images: name another with --train-split')
    for problem in split_problems(store_path, store.description, train_split):
        _LOG.info(f"note: pre-training would refuse: {problem}")
    preset = preset or default_preset(len(rows), config_file)
    config = load_dvae_config(preset, config_file, settings, steps)
    hardware = choose_hardware(device, precision)
    fixed = fixed_settings(store, rows, config, seed, train_split)
    check_output(output, fixed)
    if (output / RESULT_FILE).is_file():
        result = read_result(output)
        _LOG.info(f"dVAE: {output} is complete ({result['steps']} steps), nothing to train")
    else:
        _LOG.info(
            f"dVAE: {preset}, {len(rows)} images of split {train_split}, {config.steps} steps, {hardware.device}, "
            f"{hardware.precision}, {hardware.threads} threads"
        )
        about = {
            "kind": run_folder.DVAE, "preset": preset, "fixed_settings": fixed,
            "stores": run_folder.describe_stores([store]),
        }  # fmt: skip
        with run_folder.lock(output):
            run = DVAERun(store, rows, train_split, config, seed, hardware, output, checkpoint_every, about)
            result = DVAETrainer(run).train()
        for line in (summary(result), *quality_lines(result["controls"])):
            _LOG.info(line)
    if write_codes:
        write_missing_codes(store_path, CodeExtractor.from_pretrained(output, hardware.device))
    return result


def read_result(output: Path) -> dict[str, Any]:
    """Return the result.json of a completed run. Raise UserError if it, or the dVAE that it describes, is damaged."""
    file, remedy = output / RESULT_FILE, "restore it, or remove it to repeat the run"
    result = current_fields(read_json_object(file, remedy), DVAE_RESULT)
    own = DiscreteVAE.from_pretrained(output).fingerprint()
    if type(result.get("steps")) is not int or result.get("fingerprint") != own:
        raise UserError(f"{file}: damaged, it does not describe the dVAE in this folder: {remedy}")
    return result


def default_preset(num_images: int, config_file: Path | None) -> str:
    """Return the preset of the configuration file or, without one, the preset for a store of this size.

    Log the choice.
    """
    preset = "dvae-base" if num_images >= MIN_IMAGES_FOR_BASE else "dvae-emoji"
    if config_file:
        preset = preset_of_file(config_file)
    reason = f"the base of {config_file}" if config_file else f"fits {num_images} images"
    _LOG.info(f"dVAE: preset {preset} ({reason}); choose another with --preset")
    return preset


def choose_hardware(device: str = "auto", precision: str = "auto") -> Hardware:
    """Resolve "auto": a GPU if there is one, and bf16 autocast if the hardware supports it.

    Also set PyTorch's number of threads and its allocator.
    """
    device = choose_device(device)
    keep_freed_memory(device)
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f'--precision "{precision}": choose auto, fp32 or bf16')
    if precision == "auto":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else cpu_has_bf16()
        precision = "bf16" if has_bf16 else "fp32"
    if "OMP_NUM_THREADS" not in os.environ:
        # Convolutions on an 8×8 grid are too small for more threads.
        torch.set_num_threads(min(8, len(os.sched_getaffinity(0))))
    return Hardware(device, precision, torch.get_num_threads())


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies in bf16 (AVX-512 BF16); False if unknown.

    That halves the time of a convolution.
    """
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def fixed_settings(store: FeatureStore, rows: np.ndarray, config: DVAEConfig, seed: int, split: str) -> dict[str, Any]:
    """Return what must not change between launches, by dotted key: configuration, seed and images.

    The store's fingerprint is not usable, because it changes when the codes are written. A hash of some images is used
    instead.

    Args:
        store: The store.
        rows: The image rows of the train split.
        config: The configuration of the dVAE.
        seed: The seed of the run.
        split: The train split.
    """
    some = rows[permute(np.arange(min(256, len(rows))), len(rows), "pictures")]
    images = hashlib.sha256(read_pixels(store, some).tobytes()).hexdigest()
    tree = {
        "config": config.model_dump(),
        "seed": seed,
        "train_split": split,
        "num_images": len(rows),
        "images_sha256": images,
    }
    return run_folder.flatten(tree)


def check_output(output: Path, fixed: dict[str, Any]) -> None:
    """Raise UserError if the output directory contains another run, or other files. Write nothing."""
    record = run_folder.read_record(output, run_folder.DVAE)
    if record is not None:
        recorded = {_FORMER_KEYS.get(key, key): value for key, value in record["fixed_settings"].items()}
        run_folder.compare_settings(output, {**record, "fixed_settings": _ADDED | recorded}, fixed)
        return
    own = (run_folder.LOCK_FILE, f".{run_folder.RUN_FILE}.")  # left by a launch that was killed at its start
    if output.exists() and any(not entry.name.startswith(own) for entry in output.iterdir()):
        raise UserError(f"{output}: not empty and no dVAE run ({run_folder.RUN_FILE} not found): choose another --output")


def summary(result: dict[str, Any]) -> str:
    """Return the result in one line."""
    quality = ", ".join(f"{name} {values['psnr_db']:.2f} dB" for name, values in result["reconstruction"].items())
    use = result["codebook"]
    return (
        f"dVAE: PSNR {quality} (k-means start {result['kmeans_start_psnr_db']:.2f} dB); "
        f"{use['codes_used']} codes used ({use['fraction_used']:.0%}); {result['train_seconds']:.0f} s"
    )
