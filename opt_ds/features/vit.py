"""Patches of a vision transformer: CLIP, SigLIP, DINO, ViT and the like, from a folder of transformers or timm.

Shape letters: N images, R regions, C channels, h x w patches.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import nn

from opt_ds.errors import UserError
from opt_ds.features.extractors import layer_number, weights_fingerprint
from opt_ds.features.image_input import InputOptions
from opt_ds.features.patch_encoders import (
    FAMILIES,
    TIMM,
    HuggingFaceEncoder,
    NaFlexEncoder,
    PatchEncoder,
    TimmEncoder,
    family_of,
)
from opt_ds.features.regions import RegionExtractor, RegionFeatures, boxes_with_size
from opt_ds.weights import read_config_file, read_folder, read_state_dict

_WHAT = "--image-weights of vit"
_GPU_BATCH = 16


class ViTOptions(InputOptions):
    """The options of vit."""

    weights: Path | None = Field(
        None,
        description="A Hugging Face folder (CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3, ViT), a folder of timm, or a weights file of "
        "timm with its config.json next to it.",
    )
    backbone: str | None = Field(
        None,
        description=f"Architecture that the weights must have: {', '.join(FAMILIES)}, or timm/NAME. None: that of config.json. "
        "Required for a file without config.json.",
    )
    layer: int | None = Field(
        None,
        description="Layer whose output is used, from 1, or from -1 for the last. It is not normalised. None: the output of the "
        "network, after its final norm (transformers' CLIP has none for patches).",
    )
    pool: int | None = Field(
        None, ge=1, description="Cells per side that the patches are averaged to. None: one region per patch."
    )
    max_patches: int | None = Field(
        None, ge=1, description="siglip2: largest number of patches per image, whose aspect ratio is kept. None: as the model."
    )


class ViTExtractor(RegionExtractor):
    """The patch tokens of a vision transformer, each with its place in the image; class and register tokens are left out.

    The regions have no classes, so MRC is disabled. The network runs in fp32.
    """

    name = "vit"
    options = ViTOptions
    num_classes = 0

    def __init__(self, options: ViTOptions | None = None, device: str = "cpu") -> None:
        options = options or ViTOptions()
        if options.weights is None:
            raise UserError("--images vit: it needs a model: name its folder with --image-weights")
        self._on_cpu = torch.device(device).type == "cpu"
        self._pool = options.pool
        self._encoder, self._backbone = open_encoder(options.weights, options, device)
        self._weights_sha256 = weights_fingerprint(options.weights)
        self._layer = layer_number(options.layer, self._encoder.num_layers, "image.layer")
        self.dim = self._encoder.dim
        patches = self._encoder.patches
        if self._pool is not None and patches is not None and self._pool > patches:
            raise UserError(f"image.pool {self._pool}: the model has {patches} x {patches} patches: choose at most {patches}")

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint: everything that the features depend on."""
        return {
            "name": self.name,
            "backbone": self._backbone,
            "layer": self._layer,
            "pool": self._pool,
            **self._encoder.fingerprint(),
            "package": self._encoder.package,
            "version": self._encoder.version,
            "weights_sha256": self._weights_sha256,
        }

    def extract(self, inputs: Sequence[Image.Image | None]) -> list[RegionFeatures | None]:
        """Return one region per patch, or per cell of `pool`, row by row."""
        return [None if found is None else _regions(*found) for found in self.features(inputs)]

    @torch.inference_mode()
    def features(self, inputs: Sequence[Image.Image | None]) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """Return per image the features, float32 [R, C], and the corners of their places in 0..1, float64 [R, 4].

        On a CPU each image runs alone. On a GPU an empty image stands in for a missing one, because the last bits of the
        features may depend on the size of the batch.
        """
        results: list[tuple[np.ndarray, np.ndarray] | None] = []
        size = 1 if self._on_cpu else _GPU_BATCH
        for start in range(0, len(inputs), size):
            batch = inputs[start : start + size]
            if all(image is None for image in batch):
                results += [None] * len(batch)
                continue
            hole = Image.new("RGB", (64, 64))
            maps = self._encoder.maps([image or hole for image in batch], self._layer)
            results += [
                None if image is None else self._located(map_chw, image.size)
                for image, map_chw in zip(batch, maps, strict=True)
            ]
        return results

    def _located(self, map_chw: torch.Tensor, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        height, width = map_chw.shape[1:]
        edges_x, edges_y = self._encoder.edges(size, (height, width))
        columns, rows = (cells(count, self._pool or count) for count in (width, height))
        if self._pool is not None:
            map_chw = nn.functional.adaptive_avg_pool2d(map_chw, self._pool)
        corners = [
            (edges_x[left], edges_y[top], edges_x[right], edges_y[bottom]) for top, bottom in rows for left, right in columns
        ]
        return map_chw.flatten(1).T.float().cpu().numpy(), np.array(corners)


def cells(count: int, number: int) -> list[tuple[int, int]]:
    """Return the first and the last + 1 of `count` patches that each of `number` cells averages (adaptive average pooling)."""
    return [(cell * count // number, -(-(cell + 1) * count // number)) for cell in range(number)]


def open_encoder(path: Path, options: ViTOptions, device: str) -> tuple[PatchEncoder, str]:
    """Load an encoder. Return it and the name of its architecture.

    Args:
        path: A folder, or a file of weights.
        options: The options.
        device: Device of the network.

    Raises:
        UserError: It is not there, of an unsupported or another architecture, or its weights or settings do not fit.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder ({_WHAT})")
    folder = path if path.is_dir() else path.parent
    fields = read_config_file(folder, "vision transformer") if path.is_dir() or (folder / "config.json").is_file() else None
    backbone = _backbone(path, fields, options.backbone)
    state = read_folder(path, _WHAT) if path.is_dir() else read_state_dict(path, _WHAT)
    if options.max_patches is not None and backbone != "siglip2":
        raise UserError(f"{path}: {backbone} has no option max_patches: set image.side instead")
    if backbone.startswith(TIMM):
        state = {key.removeprefix("timm_model."): value for key, value in state.items()}
        name = backbone.removeprefix(TIMM)
        return TimmEncoder(name, fields, state, path, options, device), f"{TIMM}{name.partition('.')[0]}"
    assert fields is not None, "only timm's weights may lack a config.json"
    if backbone == "siglip2":
        return NaFlexEncoder(folder, fields, state, options, device, options.max_patches), backbone
    return HuggingFaceEncoder(folder, fields, state, options, device), backbone


def _backbone(path: Path, fields: dict[str, Any] | None, named: str | None) -> str:
    """Return the architecture of the weights: a family, or timm/ and a name. UserError if another one is named."""
    if fields is None:
        if named is None or not named.startswith(TIMM):
            raise UserError(f"{path}: no config.json is next to it: name its architecture with --image-backbone timm/NAME")
        return named
    if isinstance(fields.get("architecture"), str):
        own = f"{TIMM}{fields['architecture']}"
    elif (family := family_of(fields.get("model_type"))) is not None:
        own = family
    else:
        raise UserError(
            f"{path}: not a vision transformer that vit reads: model_type in its config.json is {fields.get('model_type')!r}: "
            f"supported are {', '.join(FAMILIES)}, and folders of timm"
        )
    if named is not None and named.partition(".")[0] != own.partition(".")[0]:
        raise UserError(f"{path}: its architecture is {own}, not {named}: --image-backbone {own}, or name other weights")
    return own


def _regions(features: np.ndarray, corners: np.ndarray) -> RegionFeatures:
    count = len(features)
    with np.errstate(over="ignore"):  # the store refuses features beyond float16
        halves = features.astype("float16")
    return RegionFeatures(halves, boxes_with_size(corners), np.zeros(count, "int16"), np.ones(count, "float16"))
