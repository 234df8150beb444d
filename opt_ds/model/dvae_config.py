"""Architecture and training recipe of the dVAE: one frozen object, its presets, strict loading, and the schedules."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from opt_ds.errors import UserError, did_you_mean
from opt_ds.user_files import expected_kind, parse_yaml, read_yaml


class DVAEConfig(BaseModel):
    """Architecture and training recipe of a dVAE; presets in `DVAE_PRESETS`. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    codebook_size: int = Field(8192, ge=2, le=65536, description="number of codes; uint16 holds them in the store")
    encoder_width: int = Field(256, ge=1, description="channels of the encoder's convolutions")
    encoder_blocks: int = Field(2, ge=0, description="residual blocks of the encoder")
    decoder_width: int = Field(256, ge=1, description="channels of the decoder's convolutions")
    decoder_blocks: int = Field(4, ge=0, description="residual blocks of the decoder")
    encoder_sigma: float = Field(0.2, gt=0, description="σ (pixels in 0..1) of the patch mixture at the start")
    pixel_sigma: float = Field(0.1, gt=0, description="σ of a pixel's likelihood: a nat's price in squared error")

    steps: int = Field(20_000, ge=1)
    batch_size: int = Field(64, ge=1, description="pictures per step")
    learning_rate: float = Field(1e-3, gt=0, description="peak, after a linear warm-up and before a cosine to zero")
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    temperature_start: float = Field(1.0, gt=0, description="Gumbel-softmax temperature of the first step")
    temperature_end: float = Field(1 / 16, gt=0, description="DALL·E's final temperature, §A.2")
    kl_weight: float = Field(1.0, ge=0, description="β of the ELBO; 1 is the ELBO itself")
    soft_share: float = Field(
        0.6, ge=0, le=1, description="share of the steps on relaxed codes; the rest trains the decoder on argmax codes"
    )
    anneal_share: float = Field(0.6, gt=0, le=1, description="share of the soft steps over which the temperature falls")
    kl_warmup_share: float = Field(0.25, ge=0, le=1, description="share of the soft steps in which β rises from zero")
    straight_through_share: float = Field(
        0.0, ge=0, le=1, description="last share of the soft steps on one-hot samples (straight-through)"
    )
    kmeans_pictures: int = Field(4096, ge=1, description="pictures whose distinct patches start the codebook")
    kmeans_patches: int = Field(30_000, ge=1)
    kmeans_iterations: int = Field(8, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "DVAEConfig":
        if self.kmeans_patches < self.codebook_size:
            raise ValueError(f"kmeans_patches {self.kmeans_patches} is below codebook_size {self.codebook_size}")
        if self.temperature_end > self.temperature_start:
            raise ValueError(f"temperature_end {self.temperature_end} is above temperature_start")
        return self


DVAE_PRESETS: dict[str, DVAEConfig] = {
    "dvae-base": DVAEConfig(kmeans_patches=200_000, kmeans_pictures=20_000),
    "dvae-emoji": DVAEConfig(
        codebook_size=1024,
        encoder_width=128,
        encoder_blocks=1,
        decoder_width=192,
        decoder_blocks=2,
        steps=1200,
        batch_size=16,
        learning_rate=2e-3,
        soft_share=0.33,
    ),
    "dvae-tiny": DVAEConfig(
        codebook_size=32,
        encoder_width=8,
        encoder_blocks=1,
        decoder_width=8,
        decoder_blocks=1,
        steps=12,
        batch_size=4,
        warmup_steps=2,
        soft_share=0.5,
        kmeans_patches=500,
        kmeans_pictures=64,
        kmeans_iterations=2,
    ),
}


@dataclass(frozen=True)
class StepSettings:
    """What the schedules give for one step. `soft`: relaxed codes, encoder and decoder; else the decoder alone."""

    soft: bool
    learning_rate: float
    temperature: float
    kl_weight: float
    straight_through: bool


def schedule(config: DVAEConfig, step: int) -> StepSettings:
    """Return the settings of step `step` (from 0), a pure function of the configuration."""
    soft_steps = round(config.steps * config.soft_share)
    progress = step / max(1, soft_steps)
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    # Geometric, so that the low temperatures, at which the codes are used, get as many steps as the high ones.
    cooling = (config.temperature_end / config.temperature_start) ** min(1.0, progress / config.anneal_share)
    return StepSettings(
        soft=step < soft_steps,
        learning_rate=config.learning_rate * warmup * cosine,
        temperature=config.temperature_start * cooling,
        kl_weight=config.kl_weight * min(1.0, progress / max(config.kl_warmup_share, 1e-9)),
        straight_through=progress >= 1 - config.straight_through_share,
    )


def load_dvae_config(
    preset: str, config_file: Path | None = None, settings: tuple[str, ...] = (), steps: int | None = None
) -> DVAEConfig:
    """Combine preset, YAML file, `key=value` settings and number of steps, each overriding the one before."""
    changes: dict[str, Any] = {}
    if config_file is not None:
        changes = read_yaml(config_file) or {}
        if not isinstance(changes, dict):
            raise UserError(f"{config_file}: a dVAE configuration is `key: value` lines, this is something else")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f'--set "{setting}": write it as key=value')
        changes[key.strip()] = parse_yaml(value, f'--set "{setting}"')
    if steps is not None:
        changes["steps"] = steps
    return build_dvae_config(preset, changes)


def build_dvae_config(preset: str, changes: dict[str, Any] | None = None) -> DVAEConfig:
    """Return preset `preset` with some keys changed. UserError names an unknown preset, key, or bad value."""
    if preset not in DVAE_PRESETS:
        known = ", ".join(DVAE_PRESETS)
        raise UserError(f'preset "{preset}" is unknown{did_you_mean(preset, DVAE_PRESETS)}: choose one of {known}')
    try:
        return DVAEConfig.model_validate({**DVAE_PRESETS[preset].model_dump(), **(changes or {})})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "configuration"
        if first["type"] == "extra_forbidden":
            keys = DVAEConfig.model_fields
            raise UserError(
                f'dVAE key "{key}" is unknown{did_you_mean(key, keys)}: choose from {", ".join(keys)}'
            ) from None
        reason = expected_kind(first["type"]) or first["msg"].removeprefix("Value error, ")
        given = f" (given: {first['input']!r})" if first["loc"] else ""
        raise UserError(f"dVAE {key}: {reason}{given}: change it with --set") from None
