"""An image as the input of a network: its size, interpolation and colours, as the model's own configuration sets them.

The pixels are prepared by the model's library (transformers or timm) with these settings. What is set here is also the place of
each part of the input in the image.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator

from opt_ds.config.section import Section
from opt_ds.errors import UserError
from opt_ds.features.hugging_face import build_processor, read_processor

#: Name of an interpolation -> Pillow's number, as preprocessor_config.json has it.
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
Colour = tuple[float, float, float]
Pixels = Callable[[Sequence[Image.Image]], torch.Tensor]
# Image processors of transformers that resize, crop and normalise and do nothing else.
_PLAIN = ("CLIPImageProcessor", "SiglipImageProcessor", "BitImageProcessor", "ViTImageProcessor", "DeiTImageProcessor")
#: As above, but it resizes after scaling the pixels to 0..1, so the resized pixels are not rounded.
_UNROUNDED = "DINOv3ViTImageProcessor"
_NAFLEX = "Siglip2ImageProcessor"
# A scaled image may be this many times as long as the input. Longer ones would take gigabytes.
_LONGEST = 64
_KEYS = (
    "size", "crop_size", "resample", "image_mean", "image_std", "do_resize", "do_center_crop", "do_rescale", "rescale_factor",
    "do_normalize", "do_pad", "patch_size", "max_num_patches",
)  # fmt: skip


class InputOptions(Section):
    """The options of the input, each of which replaces a value of the model's own configuration."""

    side: int | None = Field(None, ge=1, description="Side of the network's square input, in pixels. None: that of the model.")
    fit: Literal["crop", "squash"] | None = Field(
        None,
        description="crop: scale the shorter side to `resized` and cut the square out of the centre. squash: scale both sides, "
        "which keeps the whole image and not its aspect ratio. None: as the model.",
    )
    resized: int | None = Field(
        None, ge=1, description="Side that the image is scaled to before the square is cut out. None: as the model, for `side`."
    )
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] | None = Field(
        None, description="Interpolation of the scaled image. None: that of the model."
    )
    mean: Colour | None = Field(None, description="Mean of red, green and blue in 0..1. None: that of the model.")
    std: Colour | None = Field(None, description="As `mean`: their standard deviation.")

    @model_validator(mode="after")
    def _positive(self) -> "InputOptions":
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std: must be more than 0")
        return self


@dataclass(frozen=True)
class ImageInput:
    """The settings of a square input. The fields are those of `InputOptions`."""

    side: int
    fit: str
    resized: int
    interpolation: str
    mean: Colour
    std: Colour

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings as the options that set them, in JSON."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def edges(self, size: tuple[int, int], starts: np.ndarray, to_nearest: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return where positions of the input are in the image, in 0..1, as float64 arrays (x, y).

        Args:
            size: Width and height of the image.
            starts: Positions in the input, in pixels.
            to_nearest: Whether the library rounds the centre's first pixel to the nearest one (timm), not down (transformers).
        """
        rounded = round if to_nearest else math.floor
        found = [(rounded((side - self.side) / 2) + starts) / side for side in self._sides(size)]
        return found[0], found[1]

    def check_shape(self, size: tuple[int, int]) -> None:
        """Raise UserError for an image so long that scaling its shorter side would need too much memory."""
        if max(self._sides(size)) > _LONGEST * self.side:
            raise UserError(
                f"an image of {size[0]} x {size[1]} pixels is too long for cutting a square out of it: set image.fit=squash"
            )

    def _sides(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return width and height of the scaled image."""
        if self.fit == "squash":
            return self.resized, self.resized
        shorter = min(size)
        return int(self.resized * size[0] / shorter), int(self.resized * size[1] / shorter)


def settle(options: InputOptions, own: ImageInput | str, where: Path) -> ImageInput:
    """Return the settings of the model with those of the options in their place.

    Args:
        options: The options.
        own: The settings of the model, or why it has none that can be used. Then the options must set all.
        where: The model's folder, for messages.

    Raises:
        UserError: A value is set by neither, or the cut is larger than the image.
    """
    given = {field.name: value for field in fields(ImageInput) if (value := getattr(options, field.name)) is not None}
    if isinstance(own, str):
        absent = [name for name in ("side", "fit", "interpolation", "mean", "std") if name not in given]
        if absent:
            raise UserError(f"{where}: {own}: set {_options(absent)}")
        given.setdefault("resized", given["side"])
        settled = ImageInput(**given)
    else:
        if "side" in given and "resized" not in given:
            given["resized"] = round(own.resized * given["side"] / own.side)
        settled = ImageInput(**{field.name: given.get(field.name, getattr(own, field.name)) for field in fields(ImageInput)})
    if settled.resized < settled.side:
        raise UserError(f"{where}: resized {settled.resized} is less than side {settled.side}: set {_options(['resized'])}")
    return settled


def hugging_face_input(folder: Path, default: str) -> ImageInput | str:
    """Return the input of a Hugging Face folder's image processor, or why it has none that can be used.

    `default` is the processor's class if the folder does not name it. UserError if the settings cannot be read, or if the
    processor does more than resize, crop and normalise.
    """
    settings = read_processor(folder, "image_processor")
    if settings is None:
        return "no preprocessor_config.json is there, which states the size and colours of its input"
    own = build_processor((*_PLAIN, _UNROUNDED), settings, _KEYS, default, folder)
    if not own.do_resize:
        return "its images keep their size (do_resize is false)"
    crop = own.crop_size if getattr(own, "do_center_crop", False) else None
    cut = (crop.get("height"), crop.get("width")) if crop else None
    if own.size.get("shortest_edge") and not own.size.get("longest_edge"):
        fit, resized = "crop", own.size.get("shortest_edge")
    elif own.size.get("height") and own.size.get("height") == own.size.get("width"):
        fit, resized = "squash", own.size.get("height")
        cut = cut or (resized, resized)
    else:
        return f"its images are resized to {dict(own.size)}, which is not a square"
    if cut is None or cut[0] != cut[1] or getattr(own, "do_pad", False):
        return "its input is not a square"
    interpolation = next((name for name, number in INTERPOLATIONS.items() if number == own.resample), None)
    if interpolation is None:
        return f"its resample {own.resample} is no interpolation of Pillow"
    try:
        mean, std = _colours(own)
    except (TypeError, ZeroDivisionError):
        return "its mean and deviation are not those of three colours"
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        return "its mean and deviation are not those of three colours"
    return ImageInput(cut[0], fit, resized, interpolation, mean, std)


def naflex_processor(folder: Path, options: InputOptions, patch: int, max_patches: int | None) -> Any:
    """Return the image processor of SigLIP 2 with its own aspect ratio per image (NaFlex), with the options in place.

    UserError if the folder has none and the options do not set all, or for options of a square input.
    """
    square = [name for name in ("side", "fit", "resized") if getattr(options, name) is not None]
    if square:
        raise UserError(f"{folder}: its input keeps the image's aspect ratio: set image.max_patches instead of image.{square[0]}")
    given: dict[str, Any] = {"patch_size": patch}
    if max_patches is not None:
        given["max_num_patches"] = max_patches
    if options.interpolation is not None:
        given["resample"] = INTERPOLATIONS[options.interpolation]
    given |= {f"image_{name}": list(value) for name in ("mean", "std") if (value := getattr(options, name)) is not None}
    settings = read_processor(folder, "image_processor")
    if settings is None:
        wanted = {"max_patches": "max_num_patches", "interpolation": "resample", "mean": "image_mean", "std": "image_std"}
        absent = [name for name, key in wanted.items() if key not in given]
        if absent:
            raise UserError(f"{folder}: no preprocessor_config.json there: set {_options(absent)}")
    return build_processor((_NAFLEX,), {**(settings or {}), **given}, _KEYS, _NAFLEX, folder)


def timm_input(settings: Mapping[str, Any]) -> ImageInput | str:
    """Return the input of timm's `pretrained_cfg`, or why it states none that can be used."""
    absent = [key for key in ("input_size", "interpolation", "crop_pct", "mean", "std") if not settings.get(key)]
    if absent:
        return f"its pretrained_cfg states no {absent[0]}"
    try:
        channels, height, width = (int(value) for value in settings["input_size"])
        mean, std = (tuple(float(value) for value in settings[key]) for key in ("mean", "std"))
        resized = math.floor(height / float(settings["crop_pct"]))
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return "its pretrained_cfg is not readable as timm's"
    if channels != 3 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        return "it does not accept images of three colours"
    mode, interpolation = settings.get("crop_mode") or "center", str(settings["interpolation"])
    if height != width or mode not in ("center", "squash") or interpolation not in INTERPOLATIONS:
        return f"its input ({width} x {height} pixels, {mode}, {interpolation}) is not supported"
    return ImageInput(height, "crop" if mode == "center" else "squash", resized, interpolation, three(mean), three(std))


def hugging_face_pixels(chosen: ImageInput, unrounded: bool) -> Pixels:
    """Return a function from images to pixels [N, 3, side, side], float32, as transformers prepares them.

    `unrounded`: resize after scaling to 0..1, as DINOv3 does.
    """
    import transformers

    size = {"shortest_edge": chosen.resized} if chosen.fit == "crop" else {"height": chosen.resized, "width": chosen.resized}
    processor = getattr(transformers, _UNROUNDED if unrounded else _PLAIN[0])(
        size=size, crop_size={"height": chosen.side, "width": chosen.side}, resample=INTERPOLATIONS[chosen.interpolation],
        image_mean=list(chosen.mean), image_std=list(chosen.std), do_resize=True, do_center_crop=True, do_rescale=True,
        rescale_factor=1 / 255, do_normalize=True,
    )  # fmt: skip
    return lambda images: processor(images=list(images), return_tensors="pt").pixel_values


def timm_pixels(chosen: ImageInput) -> Pixels:
    """Return a function from images to pixels [N, 3, side, side], float32, as timm prepares them."""
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms

    size = chosen.resized if chosen.fit == "crop" else (chosen.resized, chosen.resized)
    transform = transforms.Compose(
        [
            transforms.Resize(size, interpolation=str_to_interp_mode(chosen.interpolation)),
            transforms.CenterCrop(chosen.side),
            transforms.ToTensor(),
            transforms.Normalize(mean=torch.tensor(chosen.mean), std=torch.tensor(chosen.std)),
        ]
    )

    def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([transform(image) for image in images])

    return pixels


def _colours(own: Any) -> tuple[Colour, Colour]:
    """Return mean and deviation for pixels in 0..1, from the processor's scale, mean and deviation."""
    mean, std = (own.image_mean, own.image_std) if own.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    scale = 255 * (own.rescale_factor if own.do_rescale else 1.0)
    return three(float(value) / scale for value in mean), three(float(value) / scale for value in std)


def three(values: Iterable[float]) -> Colour:
    """Return the values of red, green and blue."""
    return tuple(values)  # type: ignore[return-value]


def _options(names: Sequence[str]) -> str:
    return " ".join(f"--extractor-option image.{name}=…" for name in names)
