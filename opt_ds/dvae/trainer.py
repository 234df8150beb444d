"""The training loop of the dVAE: the start of its codebook, its steps, its checkpoints and the measurement at the end.

A step is a pure function of (weights, moments, seed, step). An interrupted run therefore continues bit-exactly from its
last checkpoint, on the same device with the same precision and number of threads.
"""

import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opt_ds.config import TrainConfig
from opt_ds.config.dvae import StepSettings, schedule
from opt_ds.dvae import checkpoints
from opt_ds.dvae.checkpoints import DVAEState
from opt_ds.dvae.codes import (
    CodeExtractor,
    codebook_use,
    encode_store,
    num_images,
    read_pixels,
    reconstruction_grid,
    reconstruction_quality,
    split_image_rows,
)
from opt_ds.dvae.model import DiscreteVAE, DVAEConfig, DVAELosses, fold, psnr_db
from opt_ds.dvae.quality import controlled_quality, shift
from opt_ds.errors import RunError, TrainingStoppedError, UserError
from opt_ds.ops.keyed import keyed_choice, keyed_hash, permute
from opt_ds.store.files import write_json
from opt_ds.store.reader import FeatureStore
from opt_ds.training import run_folder
from opt_ds.training.checkpoint_files import FOLDER
from opt_ds.training.checkpoint_writer import CheckpointWriter, Contents
from opt_ds.training.distributed import SingleProcess
from opt_ds.training.loop import Intervals, TrainingLoop
from opt_ds.training.signals import StopRequest
from opt_ds.training.time_limit import TimeLimit

_LOG = logging.getLogger(__name__)
RESULT_FILE = "result.json"
GRID_FILE = "reconstructions.png"
GRID_IMAGES = 16
LOG_EVERY = 20
_CONTROL_IMAGES = 128  # per split
_MEAN_IMAGES = 1024  # whose mean is one of the controls
_KEPT_CHECKPOINTS = 2  # the older one is used if the newest is damaged


@dataclass(frozen=True)
class Hardware:
    """The device, precision and thread count of a run. A resumed run is bit-exact only if they are the same."""

    device: str
    precision: str
    threads: int


@dataclass(frozen=True)
class DVAERun:
    """What a run trains on, and how.

    Attributes:
        store: The store.
        rows: The image rows to train on.
        train_split: Name of the split that `rows` belong to.
        config: The configuration of the dVAE.
        seed: Seed of all randomness.
        hardware: Device, precision and number of threads.
        output: The run folder.
        checkpoint_every: Steps between checkpoints.
        about: What run.json records about the run, besides its launches.
    """

    store: FeatureStore
    rows: np.ndarray
    train_split: str
    config: DVAEConfig
    seed: int
    hardware: Hardware
    output: Path
    checkpoint_every: int
    about: dict[str, Any]


class DVAETrainer(TrainingLoop):
    """Trains one dVAE, from the newest checkpoint of its run or from the beginning."""

    state: DVAEState

    def __init__(self, run: DVAERun) -> None:
        self.spec = run
        self.dvae = self._random_dvae()
        self.optimizer = torch.optim.AdamW(
            self.dvae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=run.config.weight_decay, fused=True
        )
        self.losses: DVAELosses | None = None  # of the last step, with its settings and gradient norm
        self.settings = schedule(run.config, 0)
        self.gradient_norm = torch.zeros(())
        self._train_codes_ns: Tensor | None = None
        found = checkpoints.resume(run.output, self.dvae, self.optimizer, run.config.steps)
        state, resumed_from = found or (self.started(), None)
        if resumed_from:
            _LOG.info(f"dVAE: resuming at step {state.step} of {run.config.steps}")
        launch = {**asdict(run.hardware), "resumed_from": resumed_from, "versions": run_folder.versions()}
        run_folder.append_launch(run.output, run.about, launch)
        group = SingleProcess()
        writer = CheckpointWriter(run.output, group, _KEPT_CHECKPOINTS, {"kind": run_folder.DVAE})
        intervals = Intervals(run.config.steps, LOG_EVERY, run.checkpoint_every)
        super().__init__(
            run.output, group, state, intervals, StopRequest(), TimeLimit(TrainConfig()), writer, bool(resumed_from)
        )

    def train(self) -> dict[str, Any]:
        """Train to the end, measure the dVAE and return the result.

        Raise TrainingStoppedError if a signal or the time limit stopped the run. It is saved then.
        """
        try:
            with self.stop:
                stopped = self.run()
            if stopped:
                raise TrainingStoppedError(stopped, self.state.step)
            return self.finish()
        finally:
            self.close()

    # ---- start

    def started(self) -> DVAEState:
        """Initialise the codebook. Return the progress of a new run, whose time includes this."""
        began, cpu_began = time.monotonic(), time.process_time()
        self._start_codebook(self.dvae)
        with torch.autocast(self.spec.hardware.device, enabled=False):
            quality = reconstruction_quality(self._extractor(), self.spec.store, self._sample(self.spec.rows, 256))
        return DVAEState(0, time.monotonic() - began, time.process_time() - cpu_began, quality.psnr_db)

    def _random_dvae(self) -> DiscreteVAE:
        """Return a dVAE with the random weights of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(keyed_hash(self.spec.seed, "weights")) % 2**63)
            return DiscreteVAE(self.spec.config).to(self.spec.hardware.device)

    def _start_codebook(self, dvae: DiscreteVAE) -> None:
        """Initialise the codebook with k-means centroids of distinct training patches."""
        config, rows = self.spec.config, self.spec.rows
        chosen = permute(np.arange(min(config.kmeans_images, len(rows))), len(rows), self.spec.seed, "kmeans")
        patches_ndyx = fold(torch.from_numpy(read_pixels(self.spec.store, rows[chosen])))
        # Only distinct patches are used. Otherwise half of the codebook would represent shades of the blank margin.
        levels_md = (patches_ndyx.flatten(2).transpose(1, 2).flatten(0, 1) + 0.5).mul(255).round().byte().numpy()
        distinct_m = np.unique(np.ascontiguousarray(levels_md).view(f"V{levels_md.shape[1]}"))
        distinct_md = distinct_m.view("uint8").reshape(len(distinct_m), -1)
        if len(distinct_md) < config.codebook_size:
            raise UserError(
                f"{self.spec.store.path}: {len(distinct_md)} distinct patches cannot fill a codebook of "
                f"{config.codebook_size}: --set codebook_size={2 ** int(math.log2(len(distinct_md)))}"
            )
        generator = torch.Generator().manual_seed(int(keyed_hash(self.spec.seed, "codebook")) % 2**63)
        kept = torch.randperm(len(distinct_md), generator=generator)[: config.kmeans_patches]
        patches_md = torch.from_numpy(distinct_md[kept.numpy()]).float() / 255 - 0.5
        dvae.start_from_patches(patches_md.to(self.spec.hardware.device), generator)

    # ---- steps

    def take_steps(self) -> Iterator[None]:
        """Take the remaining steps. Yield after each one."""
        began, cpu_began = time.monotonic() - self.state.seconds, time.process_time() - self.state.cpu_seconds
        while self.state.step < self.spec.config.steps:
            self.losses, self.settings = self.train_step()
            self.state.seconds, self.state.cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
            yield

    def train_step(self) -> tuple[DVAELosses, StepSettings]:
        """Run one optimiser step on the images that (seed, step) selects."""
        run, step, device = self.spec, self.state.step, self.spec.hardware.device
        settings = schedule(run.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate
        index = batch_index(run, step)
        pixels_nchw = torch.from_numpy(self._training_pixels(index)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=run.hardware.precision == "bf16"):
            if settings.soft:
                noise = torch.Generator(device)
                noise.manual_seed(int(keyed_hash(run.seed, "gumbel", step)) % 2**63)
                losses = self.dvae(
                    pixels_nchw, settings.temperature, settings.kl_weight, noise, settings.straight_through
                )
            else:
                losses = self.dvae.decoder_losses(pixels_nchw, self._argmax_codes(pixels_nchw, index))
        self.optimizer.zero_grad(set_to_none=True)
        losses.loss.backward()
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.dvae.parameters(), run.config.clip_norm)
        self.optimizer.step()
        return losses, settings

    def _training_pixels(self, index: np.ndarray) -> np.ndarray:
        """Return the images of this step, shifted by what (seed, step) selects if the configuration says so."""
        run, most = self.spec, self.spec.config.max_shift
        pixels_nchw = read_pixels(run.store, run.rows[index])
        if not most:
            return pixels_nchw
        places_n2 = np.arange(2 * len(index)).reshape(-1, 2)
        return shift(pixels_nchw, keyed_choice(2 * most + 1, run.seed, "shift", self.state.step, places_n2) - most)

    def _argmax_codes(self, pixels_nchw: Tensor, index: np.ndarray) -> Tensor:
        """Return the codes of the images of this step, int64 [n, 64]. Shifted images are encoded again."""
        if self.spec.config.max_shift:
            return self.dvae.encode(pixels_nchw)
        return self._frozen_codes()[index].to(pixels_nchw.device).long()

    def _frozen_codes(self) -> Tensor:
        """Return the argmax codes of the training images, int32 [n, 64].

        Computed once, since the encoder no longer changes.
        """
        if self._train_codes_ns is None:
            for parameter in self.dvae.encoder_parameters():
                parameter.requires_grad_(False)
            codes_ns = encode_store(self._extractor(), self.spec.store, self.spec.rows)
            self.dvae.train()
            self._train_codes_ns = torch.from_numpy(codes_ns.astype("int32"))
        return self._train_codes_ns

    # ---- between steps

    def log(self) -> dict[str, str]:
        """Report the metrics of the last step. Return those for the progress bar."""
        self._check_finite()
        assert self.losses is not None
        loss, mse, kl = (value.item() for value in self.losses)
        settings = self.settings
        scalars = {"loss": loss, "psnr_db": psnr_db(mse), "learning_rate": settings.learning_rate}
        if settings.soft:
            scalars |= {"kl_nats": kl, "kl_weight": settings.kl_weight, "temperature": settings.temperature}
        self.report.scalars(self.state.step, {f"dvae/{name}": value for name, value in scalars.items()}, "train")
        phase = f"temperature {settings.temperature:.2f}" if settings.soft else "argmax"
        return {"PSNR": f"{psnr_db(mse):.2f} dB", "codes": phase}

    def contents(self) -> Contents:
        """Return what a checkpoint of this step holds. Raise RunError if the step was not finite."""
        self._check_finite()
        return Contents(asdict(self.state), self.dvae, checkpoints.parameters(self.dvae, self.optimizer))

    def _check_finite(self) -> None:
        """Raise RunError if the last step was not finite: no checkpoint may hold its weights."""
        assert self.losses is not None
        loss, norm = self.losses.loss.item(), self.gradient_norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"{self.output}: loss {loss:g}, gradient norm {norm:g} at step {self.state.step}: train again with a lower "
                f"--set learning_rate=… (it was {self.spec.config.learning_rate:g}) and another --output"
            )

    # ---- end

    def finish(self) -> dict[str, Any]:
        """Measure the trained model, save it, write the grid of reconstructions, and write result.json last."""
        run, extractor, held_out = self.spec, self._extractor(), self._held_out()
        splits = {run.train_split: self._sample(run.rows, 1024)} | held_out
        quality = {name: asdict(reconstruction_quality(extractor, run.store, rows)) for name, rows in splits.items()}
        codes_ns = encode_store(extractor, run.store)
        result = {
            "reconstruction": quality,
            "controls": self._controlled_quality(held_out),
            "codebook": codebook_use(codes_ns, run.config.codebook_size),
            "kmeans_start_psnr_db": self.state.start_psnr_db,
            "steps": self.state.step,
            "train_seconds": round(self.state.seconds, 1),
            "train_cpu_seconds": round(self.state.cpu_seconds, 1),
            "hardware": asdict(run.hardware),
            "num_images": num_images(run.store),
            "fingerprint": self.dvae.fingerprint(),
        }
        self.dvae.save_pretrained(self.output)
        shown = self._sample(np.concatenate(list(held_out.values()) or [run.rows]), GRID_IMAGES)
        grid_hwc = reconstruction_grid(extractor, read_pixels(run.store, shown))
        Image.fromarray(grid_hwc).save(self.output / GRID_FILE)
        step = self.state.step
        self.report.image("dvae/true_above_reconstructed", grid_hwc, step)
        self.report.scalars(step, {f"dvae/psnr_db_{name}": values["psnr_db"] for name, values in quality.items()}, "valid")
        write_json(self.output / RESULT_FILE, result)
        shutil.rmtree(self.output / FOLDER, ignore_errors=True)
        (self.output / run_folder.OLD_DVAE_CHECKPOINT).unlink(missing_ok=True)
        return result

    def _controlled_quality(self, held_out: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return the quality on some images of each held-out split, or of the training split if there is none."""
        run, untrained = self.spec, self._random_dvae()
        self._start_codebook(untrained)
        start = CodeExtractor(untrained, run.hardware.device)
        mean_chw = read_pixels(run.store, self._sample(run.rows, _MEAN_IMAGES)).mean(0)
        return {
            name: controlled_quality(
                self._extractor(), start, mean_chw, read_pixels(run.store, self._sample(rows, _CONTROL_IMAGES))
            )
            for name, rows in (held_out or {run.train_split: run.rows}).items()
        }

    def _held_out(self) -> dict[str, np.ndarray]:
        """Return the image rows of each other split, without images that were trained on."""
        store = self.spec.store
        splits = [name for name in store.description.split_names if name != self.spec.train_split]
        rows_of = {name: np.setdiff1d(split_image_rows(store, name), self.spec.rows) for name in splits}
        return {name: rows for name, rows in rows_of.items() if len(rows)}

    def _sample(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Return `count` of the rows (or all of them), sampled by the seed, ascending."""
        chosen = permute(np.arange(min(count, len(rows))), len(rows), self.spec.seed, "sample")
        return rows[np.sort(chosen)]

    def _extractor(self) -> CodeExtractor:
        """Return a code extractor with the current weights."""
        return CodeExtractor(self.dvae, self.spec.hardware.device)


def batch_index(run: DVAERun, step: int) -> np.ndarray:
    """Return the indices of the training images of a step.

    Every epoch uses each image once, in a keyed order. Batches may span two epochs.
    """
    count = len(run.rows)
    position = step * run.config.batch_size + np.arange(run.config.batch_size)
    return permute(position % count, count, run.seed, "batch", position // count)
