"""Configuration of the dVAE (architecture and training), its presets, and its schedules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from opt_ds.config.section import Section, current_names, section_from_dict
from opt_ds.config.sources import PRESET_FOLDER, merge, preset_names, read_source
from opt_ds.errors import UserError, did_you_mean

DVAE_PRESET_FOLDER = PRESET_FOLDER / "dvae"
#: Preset for configuration files that name none.
BASE_PRESET = "dvae-base"


class DVAEConfig(Section):
    """Architecture and training of the dVAE."""

    label: ClassVar[str] = "dVAE config"
    renamed = {  # noqa: RUF012
        "soft_share": "soft_fraction", "anneal_share": "anneal_fraction", "kl_warmup_share": "kl_warmup_fraction",
        "straight_through_share": "straight_through_fraction", "kmeans_pictures": "kmeans_images",
    }  # fmt: skip

    codebook_size: int = Field(8192, ge=2, le=65536, description="Number of codes. The store holds them as uint16.")
    encoder_width: int = Field(256, ge=1, description="Channels of the encoder's convolutions.")
    encoder_blocks: int = Field(2, ge=0, description="Number of residual blocks of the encoder.")
    decoder_width: int = Field(256, ge=1, description="Channels of the decoder's convolutions.")
    decoder_blocks: int = Field(4, ge=0, description="Number of residual blocks of the decoder.")
    encoder_sigma: float = Field(
        0.2,
        gt=0,
        description="Initial σ of the mixture of patches, for pixels in 0–1. A larger σ gives softer code "
        "probabilities.",
    )
    pixel_sigma: float = Field(
        0.1, gt=0, description="σ of the pixel likelihood, for pixels in 0–1: the squared error is divided by 2σ²."
    )
    l1_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the absolute error, divided by σ, that is added to the squared error. It makes edges sharper. "
        "0: the squared error alone, which PSNR measures.",
    )
    coarse_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared error of the means of 4 x 4 pixels, divided by 2σ², that is added to the squared "
        "error of pixels. It makes the colours of areas right. 0: none.",
    )
    steps: int = Field(20_000, ge=1, description="Number of optimizer steps.")
    batch_size: int = Field(64, ge=1, description="Images per optimizer step.")
    max_shift: int = Field(
        0,
        ge=0,
        le=8,
        description="Largest random shift of a training image in each direction, in pixels (augmentation). 0: none.",
    )
    learning_rate: float = Field(
        1e-3, gt=0, description="Peak learning rate, between a linear warm-up and a cosine decay to 0."
    )
    warmup_steps: int = Field(20, ge=0, description="Optimizer steps of the linear warm-up. 0: no warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay. 0: none.")
    clip_norm: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=True,
        description="Largest gradient norm; larger gradients are scaled down. .inf: no clipping.",
    )
    temperature_start: float = Field(1.0, gt=0, description="Gumbel-softmax temperature of the first step.")
    temperature_end: float = Field(1 / 16, gt=0, description="Final Gumbel-softmax temperature (as DALL·E, §A.2).")
    kl_weight: float = Field(1.0, ge=0, description="Final weight β of the KL term. 1: the ELBO. 0: no KL term.")
    soft_fraction: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Fraction of the steps that train encoder and decoder on relaxed codes. The others train the "
        "decoder on argmax codes.",
    )
    anneal_fraction: float = Field(
        0.6, gt=0, le=1, description="Fraction of the steps on relaxed codes over which the temperature falls."
    )
    kl_warmup_fraction: float = Field(
        0.25, ge=0, le=1, description="Fraction of the steps on relaxed codes over which β rises from 0. 0: no warm-up."
    )
    straight_through_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Last fraction of the steps on relaxed codes that use one-hot codes (straight-through). 0: none.",
    )
    kmeans_images: int = Field(
        4096, ge=1, description="Images whose distinct patches initialise the codebook by k-means."
    )
    kmeans_patches: int = Field(
        30_000, ge=1, description="Largest number of distinct patches for k-means; at least `codebook_size`."
    )
    kmeans_iterations: int = Field(
        8, ge=0, description="Iterations of k-means. 0: the codebook starts from sampled patches."
    )

    @model_validator(mode="after")
    def _check(self) -> "DVAEConfig":
        if self.kmeans_patches < self.codebook_size:
            raise ValueError(f"kmeans_patches {self.kmeans_patches} is below codebook_size {self.codebook_size}")
        if self.temperature_end > self.temperature_start:
            raise ValueError(f"temperature_end {self.temperature_end} is above temperature_start")
        return self


@dataclass(frozen=True)
class StepSettings:
    """Scheduled settings of one step.

    If `soft`, encoder and decoder are trained on relaxed codes, otherwise the decoder alone.
    """

    soft: bool
    learning_rate: float
    temperature: float
    kl_weight: float
    straight_through: bool


def schedule(config: DVAEConfig, step: int) -> StepSettings:
    """Return the settings of step `step` (0-based), a pure function of the configuration."""
    soft_steps = round(config.steps * config.soft_fraction)
    progress = step / max(1, soft_steps)
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    # The decay is geometric, so that low temperatures, at which the codes are used, get as many steps as high ones.
    cooling = (config.temperature_end / config.temperature_start) ** min(1.0, progress / config.anneal_fraction)
    return StepSettings(
        soft=step < soft_steps,
        learning_rate=config.learning_rate * warmup * cosine,
        temperature=config.temperature_start * cooling,
        kl_weight=config.kl_weight * min(1.0, progress / max(config.kl_warmup_fraction, 1e-9)),
        straight_through=progress >= 1 - config.straight_through_fraction,
    )


def load_dvae_config(
    preset: str | None, config_file: Path | str | None = None, settings: Sequence[str] = (), steps: int | None = None
) -> DVAEConfig:
    """Load the configuration from a preset, a YAML file, `key=value` settings and a number of steps.

    Later ones override earlier ones.

    Args:
        preset: Name of the preset. None: the one that the file names, otherwise `BASE_PRESET`.
        config_file: YAML file, or None.
        settings: Overrides of the form "key=value".
        steps: Number of steps, or None.

    Returns:
        The configuration.

    Raises:
        UserError: In one line, for an unknown preset or key, an unreadable file or a bad value.
    """
    current = partial(current_names, DVAEConfig, where=f"dVAE config {config_file}")
    tree = read_source(str(config_file), DVAE_PRESET_FOLDER, current) if config_file is not None else {}
    named = tree.pop("preset", None)
    if preset is not None and named is not None and preset != named:
        raise UserError(f"--preset {preset}: {config_file} starts from preset {named}: omit --preset")
    tree = merge(_preset_tree(named or preset or BASE_PRESET), tree)
    if steps is not None:
        settings = [*settings, f"steps={steps}"]
    return section_from_dict(DVAEConfig, tree, f"dVAE config {config_file or preset or BASE_PRESET}", settings)


def preset_of_file(config_file: Path | str) -> str:
    """Return the preset that a configuration file starts from."""
    return str(read_source(str(config_file), DVAE_PRESET_FOLDER).get("preset") or BASE_PRESET)


def _preset_tree(preset: str) -> dict[str, Any]:
    names = preset_names(DVAE_PRESET_FOLDER)
    if preset not in names:
        raise UserError(f'preset "{preset}" is unknown{did_you_mean(preset, names)}: choose one of {", ".join(names)}')
    tree = read_source(preset, DVAE_PRESET_FOLDER)
    del tree["preset"]
    return tree


DVAE_PRESETS: dict[str, DVAEConfig] = {name: load_dvae_config(name) for name in preset_names(DVAE_PRESET_FOLDER)}
