"""Train the dVAE (stage 1 of the image decoder) on the images of a store, then write its codes into the store.

It is started by path (`python opt_ds/train_dvae.py --store DIR --output DIR`) or as `opt-ds train-dvae`. A step is a
pure function of (weights, moments, seed, step). An interrupted run therefore continues bit-exactly from its last
checkpoint, on the same device with the same precision and number of threads.

The output directory is a run folder like every other (`opt_ds.training.run_folder`): run.json, a lock, metrics.jsonl
and tensorboard/. It also has config.json and model.safetensors (`DiscreteVAE.from_pretrained`), result.json (PSNR per
split, codebook use, time), reconstructions.png (original rows above reconstructed rows), and checkpoint.pt until the
run completes.
"""

import hashlib
import logging
import math
import os
import pickle
import time
import zipfile
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opt_ds.config.dvae import StepSettings, load_dvae_config, preset_of_file, schedule
from opt_ds.devices import choose_device
from opt_ds.dvae.codes import (
    CodeExtractor,
    codebook_use,
    encode_store,
    num_images,
    read_pixels,
    reconstruction_grid,
    reconstruction_quality,
    split_image_rows,
    write_missing_codes,
)
from opt_ds.dvae.model import DiscreteVAE, DVAEConfig, DVAELosses, fold, psnr_db
from opt_ds.errors import RunError, TrainingStoppedError, UserError
from opt_ds.ops.keyed import keyed_hash, permute
from opt_ds.store.files import atomic_file, write_json
from opt_ds.store.foreign import read_json_object
from opt_ds.store.reader import FeatureStore
from opt_ds.store.trainable import split_problems
from opt_ds.store.verify import open_store
from opt_ds.training import run_folder
from opt_ds.training.host_memory import keep_freed_memory
from opt_ds.training.metrics import Reporter
from opt_ds.training.run_folder import DVAE_CHECKPOINT_FILE as CHECKPOINT_FILE
from opt_ds.training.signals import StopRequest

_LOG = logging.getLogger(__name__)
RESULT_FILE = "result.json"
GRID_FILE = "reconstructions.png"
GRID_PICTURES = 16
LOG_EVERY = 20
# With fewer images than this, a codebook of 8,192 has fewer than about 150 patches per code.
MIN_PICTURES_FOR_BASE = 20_000


@dataclass(frozen=True)
class Hardware:
    """The device, precision and thread count of a run. A resumed run is bit-exact only if they are the same."""

    device: str
    precision: str
    threads: int


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
        TrainingStoppedError: A signal requested a stop. A checkpoint has been saved.
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
    identity = run_identity(store, rows, config, seed, train_split)
    check_output(output, identity)
    if (output / RESULT_FILE).is_file():
        result = read_result(output)
        _LOG.info(f"dVAE: {output} is complete ({result['steps']} steps), nothing to train")
    else:
        _LOG.info(
            f"dVAE: {preset}, {len(rows)} images of split {train_split}, {config.steps} steps, {hardware.device}, "
            f"{hardware.precision}, {hardware.threads} threads"
        )
        about = {
            "kind": run_folder.DVAE, "preset": preset, "identity": identity, "stores": run_folder.describe_stores([store])
        }  # fmt: skip
        with run_folder.lock(output):
            run_folder.append_launch(output, about, {**asdict(hardware), "versions": run_folder.versions()})
            result = Training(store, rows, config, seed, hardware, output, train_split, checkpoint_every).run()
        _LOG.info(summary(result))
    if write_codes:
        write_missing_codes(store_path, CodeExtractor.from_pretrained(output, hardware.device))
    return result


def read_result(output: Path) -> dict[str, Any]:
    """Return the result.json of a completed run. Raise UserError if it, or the dVAE that it describes, is damaged."""
    file, remedy = output / RESULT_FILE, "restore it, or remove it to measure the dVAE again"
    result = read_json_object(file, remedy)
    if type(result.get("steps")) is not int or result.get("identity") != DiscreteVAE.from_pretrained(output).identity():
        raise UserError(f"{file}: damaged, it does not describe the dVAE in this folder: {remedy}")
    return result


def default_preset(num_pictures: int, config_file: Path | None) -> str:
    """Return the preset of the configuration file or, without one, the preset for a store of this size.

    Log the choice.
    """
    if config_file:
        preset = preset_of_file(config_file)
    else:
        preset = "dvae-base" if num_pictures >= MIN_PICTURES_FOR_BASE else "dvae-emoji"
    reason = f"the base of {config_file}" if config_file else f"fits {num_pictures} images"
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


def run_identity(store: FeatureStore, rows: np.ndarray, config: DVAEConfig, seed: int, split: str) -> dict[str, Any]:
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
    pictures = hashlib.sha256(read_pixels(store, some).tobytes()).hexdigest()
    tree = {
        "config": config.model_dump(),
        "seed": seed,
        "train_split": split,
        "num_pictures": len(rows),
        "pictures_sha256": pictures,
    }
    return run_folder.flatten(tree)


def check_output(output: Path, identity: dict[str, Any]) -> None:
    """Raise UserError if the output directory contains another run, or other files. Write nothing."""
    record = run_folder.read_record(output, run_folder.DVAE)
    if record is not None:
        run_folder.compare_identity(output, record, identity)
        return
    own = (run_folder.LOCK_FILE, f".{run_folder.RUN_FILE}.")  # left by a launch that was killed at its start
    if output.exists() and any(not entry.name.startswith(own) for entry in output.iterdir()):
        raise UserError(f"{output}: not empty and no dVAE run ({run_folder.RUN_FILE} not found): choose another --output")


class Training:
    """The training loop of one run, from its start or its checkpoint.

    Args:
        store: The store.
        rows: The image rows to train on.
        config: The configuration of the dVAE.
        seed: Seed of all randomness.
        hardware: Device, precision and number of threads.
        output: The run folder.
        train_split: Name of the split that `rows` belong to.
        checkpoint_every: Steps between checkpoints.
    """

    def __init__(
        self,
        store: FeatureStore,
        rows: np.ndarray,
        config: DVAEConfig,
        seed: int,
        hardware: Hardware,
        output: Path,
        train_split: str,
        checkpoint_every: int,
    ) -> None:
        self.store, self.rows, self.config, self.seed = store, rows, config, seed
        self.hardware, self.output, self.train_split = hardware, output, train_split
        self.checkpoint_every = checkpoint_every
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(keyed_hash(seed, "weights")) % 2**63)
            self.dvae = DiscreteVAE(config)
        self.dvae.to(hardware.device)
        self.optimizer = torch.optim.AdamW(
            self.dvae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.gradient_norm = torch.zeros(())
        self.start_psnr_db: float | None = None
        self.train_codes_ns: Tensor | None = None

    def run(self) -> dict[str, Any]:
        """Train to the end and return the result."""
        began, cpu_began = time.monotonic(), time.process_time()
        if not self.resume():
            self.start_codebook()
        elapsed, cpu_elapsed = self.seconds, self.cpu_seconds
        report = Reporter(self.output, self.step, self.config.steps, enabled=True)
        with closing(report):
            with StopRequest() as stop:
                while self.step < self.config.steps:
                    losses, settings = self.train_step()
                    self.step += 1
                    at_end = self.step == self.config.steps
                    reason = "" if at_end else stop.reason()
                    logs = self.step % LOG_EVERY == 0 or at_end
                    saves = (self.step % self.checkpoint_every == 0 and not at_end) or bool(reason)
                    if logs or saves:
                        self.check_finite(losses)
                    report.advance(self.log(report, losses, settings) if logs else None)
                    self.seconds = elapsed + time.monotonic() - began
                    self.cpu_seconds = cpu_elapsed + time.process_time() - cpu_began
                    if saves:
                        self.save_checkpoint()
                    if reason:
                        raise TrainingStoppedError(reason, self.step)
            return self.finish(report)

    def start_codebook(self) -> None:
        """Initialise the codebook with k-means centroids of distinct training patches.

        Measure the PSNR of that quantiser.
        """
        config = self.config
        chosen = permute(np.arange(min(config.kmeans_pictures, len(self.rows))), len(self.rows), self.seed, "kmeans")
        patches_ndyx = fold(torch.from_numpy(read_pixels(self.store, self.rows[chosen])))
        # Only distinct patches are used. Otherwise half of the codebook would represent shades of the blank margin.
        levels_md = (patches_ndyx.flatten(2).transpose(1, 2).flatten(0, 1) + 0.5).mul(255).round().byte().numpy()
        distinct_m = np.unique(np.ascontiguousarray(levels_md).view(f"V{levels_md.shape[1]}"))
        distinct_md = distinct_m.view("uint8").reshape(len(distinct_m), -1)
        if len(distinct_md) < config.codebook_size:
            raise UserError(
                f"{self.store.path}: {len(distinct_md)} distinct patches cannot fill a codebook of "
                f"{config.codebook_size}: --set codebook_size={2 ** int(math.log2(len(distinct_md)))}"
            )
        generator = torch.Generator().manual_seed(int(keyed_hash(self.seed, "codebook")) % 2**63)
        kept = torch.randperm(len(distinct_md), generator=generator)[: config.kmeans_patches]
        patches_md = torch.from_numpy(distinct_md[kept.numpy()]).float() / 255 - 0.5
        self.dvae.start_from_patches(patches_md.to(self.hardware.device), generator)
        self.start_psnr_db = self.psnr_of(self.sample_rows(self.rows, 256))

    def train_step(self) -> tuple[DVAELosses, StepSettings]:
        """Run one optimiser step on the images that (seed, step) selects."""
        settings = schedule(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate
        index = self.batch_index(self.step)
        pixels_nchw = torch.from_numpy(read_pixels(self.store, self.rows[index])).to(self.hardware.device)
        with torch.autocast(self.hardware.device, torch.bfloat16, enabled=self.hardware.precision == "bf16"):
            if settings.soft:
                noise = torch.Generator(self.hardware.device)
                noise.manual_seed(int(keyed_hash(self.seed, "gumbel", self.step)) % 2**63)
                losses = self.dvae(
                    pixels_nchw, settings.temperature, settings.kl_weight, noise, settings.straight_through
                )
            else:
                codes_ns = self.frozen_codes()[index].to(self.hardware.device).long()
                losses = self.dvae.decoder_losses(pixels_nchw, codes_ns)
        self.optimizer.zero_grad(set_to_none=True)
        losses.loss.backward()
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.dvae.parameters(), self.config.clip_norm)
        self.optimizer.step()
        return losses, settings

    def batch_index(self, step: int) -> np.ndarray:
        """Return the indices of the training images of a step.

        Every epoch uses each image once, in a keyed order. Batches may span two epochs.
        """
        position = step * self.config.batch_size + np.arange(self.config.batch_size)
        return permute(position % len(self.rows), len(self.rows), self.seed, "batch", position // len(self.rows))

    def frozen_codes(self) -> Tensor:
        """Return the argmax codes of the training images, int32 [n, 64].

        Computed once, since the encoder no longer changes.
        """
        if self.train_codes_ns is None:
            for parameter in self.dvae.encoder_parameters():
                parameter.requires_grad_(False)
            codes_ns = encode_store(self.extractor(), self.store, self.rows)
            self.dvae.train()
            self.train_codes_ns = torch.from_numpy(codes_ns.astype("int32"))
        return self.train_codes_ns

    def extractor(self) -> CodeExtractor:
        """Return a code extractor with the current weights."""
        return CodeExtractor(self.dvae, self.hardware.device)

    def psnr_of(self, rows: np.ndarray) -> float:
        """Return the PSNR in dB of argmax codes on some image rows, computed in fp32."""
        with torch.autocast(self.hardware.device, enabled=False):
            return reconstruction_quality(self.extractor(), self.store, rows).psnr_db

    def sample_rows(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Return `count` of the rows (or all of them), sampled by the seed, ascending."""
        chosen = permute(np.arange(min(count, len(rows))), len(rows), self.seed, "sample")
        return rows[np.sort(chosen)]

    def held_out(self) -> dict[str, np.ndarray]:
        """Return the image rows of each other split, without images that were trained on."""
        splits = [name for name in self.store.description.split_names if name != self.train_split]
        rows_of = {name: np.setdiff1d(split_image_rows(self.store, name), self.rows) for name in splits}
        return {name: rows for name, rows in rows_of.items() if len(rows)}

    def check_finite(self, losses: DVAELosses) -> None:
        """Raise RunError if the last step was not finite: no checkpoint may hold its weights."""
        loss, norm = losses.loss.item(), self.gradient_norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"{self.output}: loss {loss:g}, gradient norm {norm:g} at step {self.step}: train again with a lower "
                f"--set learning_rate=… (it was {self.config.learning_rate:g}) and another --output"
            )

    def log(self, report: Reporter, losses: DVAELosses, settings: StepSettings) -> dict[str, str]:
        """Report the metrics of a step. Return those for the progress bar."""
        loss, mse, kl = (value.item() for value in losses)
        scalars = {"loss": loss, "psnr_db": psnr_db(mse), "learning_rate": settings.learning_rate}
        if settings.soft:
            scalars |= {"kl_nats": kl, "kl_weight": settings.kl_weight, "temperature": settings.temperature}
        report.scalars(self.step, {f"dvae/{name}": value for name, value in scalars.items()}, "train")
        phase = f"temperature {settings.temperature:.2f}" if settings.soft else "argmax"
        return {"PSNR": f"{psnr_db(mse):.2f} dB", "codes": phase}

    def save_checkpoint(self) -> None:
        """Write everything that the rest of the run depends on, atomically."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "start_psnr_db": self.start_psnr_db,
            "dvae": self.dvae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_file(self.output / CHECKPOINT_FILE) as temporary:
            torch.save(state, temporary)

    def resume(self) -> bool:
        """Continue from the checkpoint if there is one.

        Return whether there is. Raise UserError if it cannot be read.
        """
        file = self.output / CHECKPOINT_FILE
        if not file.is_file():
            return False
        damaged = UserError(f"{file}: damaged checkpoint: remove it to start the run again")
        # The archive has a CRC-32 per part. PyTorch does not check all of them.
        if not zipfile.is_zipfile(file) or _damaged_part(file) is not None:
            raise damaged
        try:
            state = torch.load(file, map_location=self.hardware.device, weights_only=True)
            self.dvae.load_state_dict(state["dvae"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.start_psnr_db = int(state["step"]), state["start_psnr_db"]
            self.seconds, self.cpu_seconds = float(state["seconds"]), float(state["cpu_seconds"])
        except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise damaged from None
        if not 0 <= self.step <= self.config.steps:
            raise damaged
        _LOG.info(f"dVAE: resuming at step {self.step} of {self.config.steps}")
        return True

    def finish(self, report: Reporter) -> dict[str, Any]:
        """Measure the trained model, save it, write the grid of reconstructions, and write result.json last."""
        extractor, held_out = self.extractor(), self.held_out()
        splits = {self.train_split: self.sample_rows(self.rows, 1024)} | held_out
        quality = {name: asdict(reconstruction_quality(extractor, self.store, rows)) for name, rows in splits.items()}
        codes_ns = encode_store(extractor, self.store)
        result = {
            "reconstruction": quality,
            "codebook": codebook_use(codes_ns, self.config.codebook_size),
            "kmeans_start_psnr_db": self.start_psnr_db,
            "steps": self.step,
            "train_seconds": round(self.seconds, 1),
            "train_cpu_seconds": round(self.cpu_seconds, 1),
            "hardware": asdict(self.hardware),
            "num_pictures": num_images(self.store),
            "identity": self.dvae.identity(),
        }
        self.dvae.save_pretrained(self.output)
        shown = self.sample_rows(np.concatenate(list(held_out.values()) or [self.rows]), GRID_PICTURES)
        grid_hwc = reconstruction_grid(extractor, read_pixels(self.store, shown))
        Image.fromarray(grid_hwc).save(self.output / GRID_FILE)
        report.picture("dvae/true_above_reconstructed", grid_hwc, self.step)
        report.scalars(self.step, {f"dvae/psnr_db_{name}": values["psnr_db"] for name, values in quality.items()}, "valid")
        write_json(self.output / RESULT_FILE, result)
        (self.output / CHECKPOINT_FILE).unlink(missing_ok=True)
        return result


def _damaged_part(archive: Path) -> str | None:
    try:
        with zipfile.ZipFile(archive) as parts:
            return parts.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        return str(error)


def summary(result: dict[str, Any]) -> str:
    """Return the result in one line."""
    quality = ", ".join(f"{name} {values['psnr_db']:.2f} dB" for name, values in result["reconstruction"].items())
    use = result["codebook"]
    return (
        f"dVAE: PSNR {quality} (k-means start {result['kmeans_start_psnr_db']:.2f} dB); "
        f"{use['codes_used']} codes used ({use['fraction_used']:.0%}); {result['train_seconds']:.0f} s"
    )
