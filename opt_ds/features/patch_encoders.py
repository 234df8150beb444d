"""Vision transformers of transformers and timm as encoders of patches: how each is loaded, and where its patches are.

Shape letters: N images, T tokens, C channels, h x w patches.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from opt_ds.errors import UserError, did_you_mean
from opt_ds.features.hugging_face import build_config, load_model, model_class
from opt_ds.features.image_input import (
    ImageInput,
    InputOptions,
    Pixels,
    hugging_face_input,
    hugging_face_pixels,
    naflex_processor,
    settle,
    timm_input,
    timm_pixels,
)
from opt_ds.weights import Tensors, fit, without

TIMM = "timm/"
# Arguments of timm's create_model that select files or code rather than the network. They are ignored.
_NOT_OURS = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable", "exportable",
    "no_jit", "features_only", "num_classes",
)  # fmt: skip


class PatchEncoder(ABC):
    """A vision transformer that returns the features of patches, without class and register tokens."""

    #: Size of a feature.
    dim: int
    #: Number of layers.
    num_layers: int
    #: Package that runs the network.
    package: str
    #: Patches per side of the input; None if they depend on the image.
    patches: int | None = None

    @abstractmethod
    def maps(self, images: Sequence[Image.Image], layer: int | None) -> list[torch.Tensor]:
        """Return the features [C, h, w] of each image's patches, float32.

        Args:
            images: Images.
            layer: Layer whose output is used, from 1. None: the output of the network, after its final norm if it has one.
        """

    @abstractmethod
    def edges(self, size: tuple[int, int], grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the edges of the columns [w + 1] and rows [h + 1] of patches in an image of this width and height, in 0..1."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return the settings of the input, under the names of their options."""

    @property
    def version(self) -> str:
        """Version of the package."""
        return version(self.package)


@dataclass(frozen=True)
class _Family:
    """An architecture of transformers.

    `prefix`: tokens before the patches besides registers. `others`: regular expression of the weights that are not the encoder's.
    """

    model: str
    processor: str
    prefix: int
    others: str
    unused: str = ""
    resizes_positions: bool = False  # whether the model must be asked to interpolate its position embeddings
    arguments: tuple[tuple[str, Any], ...] = ()


_DUAL = r"text_model\..*|(text|visual)_projection\.weight|logit_(scale|bias)|classifier\..*"
_HEAD = r"classifier\..*"
FAMILIES = {
    "clip": _Family("CLIPVisionModel", "CLIPImageProcessor", 1, _DUAL, resizes_positions=True),
    "siglip": _Family("SiglipVisionModel", "SiglipImageProcessor", 0, _DUAL, resizes_positions=True),
    "siglip2": _Family("Siglip2VisionModel", "Siglip2ImageProcessor", 0, _DUAL),
    "dinov2": _Family("Dinov2Model", "BitImageProcessor", 1, _HEAD, unused=r"embeddings\.mask_token"),
    "dinov2_with_registers": _Family(
        "Dinov2WithRegistersModel", "BitImageProcessor", 1, _HEAD, unused=r"embeddings\.mask_token"
    ),
    "dinov3_vit": _Family("DINOv3ViTModel", "DINOv3ViTImageProcessor", 1, _HEAD, unused=r"embeddings\.mask_token"),
    "vit": _Family(
        "ViTModel", "ViTImageProcessor", 1, r"(vit\.)?pooler\..*|classifier\..*|decoder\..*|(vit\.)?embeddings\.mask_token",
        resizes_positions=True, arguments=(("add_pooling_layer", False),),
    ),
}  # fmt: skip


def check_side(side: int, trained: int, options: InputOptions, where: Path) -> None:
    """Raise UserError if the model's own files disagree on the side of its input, and the options do not set it."""
    if side != trained and options.side is None:
        raise UserError(
            f"{where}: its input settings say {side} x {side} pixels, its network was built for {trained} x {trained}: choose "
            f"with --extractor-option image.side={trained} (position embeddings are interpolated for any other)"
        )


def family_of(model_type: Any) -> str | None:
    """Return the family of a folder's `model_type`, also if the folder has the vision part only; None for no supported one."""
    name = str(model_type).removesuffix("_vision_model")
    return name if name in FAMILIES else None


class HuggingFaceEncoder(PatchEncoder):
    """A vision transformer of transformers, from its folder."""

    package = "transformers"

    def __init__(self, folder: Path, fields: Mapping[str, Any], state: Tensors, options: InputOptions, device: str) -> None:
        name = family_of(fields["model_type"])
        assert name is not None, "the caller has checked it"
        self._family = FAMILIES[name]
        self._device = device
        config = build_config(folder, fields, fields["model_type"])
        config = getattr(config, "vision_config", config)
        self._model = load_model(
            model_class(self._family.model, folder), config, without(state, self._family.others), folder,
            f"the {self._family.model} of its config.json", self._family.unused, **dict(self._family.arguments),
        )  # fmt: skip
        self._model.to(device)
        self.dim, self.num_layers = int(config.hidden_size), int(config.num_hidden_layers)
        self._patch = _side(config.patch_size, folder, "patch_size")
        self._prefix = self._family.prefix + int(getattr(config, "num_register_tokens", 0))
        self._settle(folder, options, getattr(config, "image_size", None))

    def _settle(self, folder: Path, options: InputOptions, trained_side: Any) -> None:
        own = hugging_face_input(folder, self._family.processor)
        self._input = settle(options, own, folder)
        self._pixels: Pixels = hugging_face_pixels(self._input, self._family.processor.startswith("DINOv3"))
        self._arguments: dict[str, Any] = {}
        self.patches = self._input.side // self._patch
        if self._family.resizes_positions and trained_side is not None:
            trained = _side(trained_side, folder, "image_size")
            check_side(self._input.side, trained, options, folder)
            self._arguments = {"interpolate_pos_encoding": True} if self._input.side != trained else {}

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings of the input, under the names of their options."""
        return self._input.fingerprint()

    def maps(self, images: Sequence[Image.Image], layer: int | None) -> list[torch.Tensor]:
        """Return the features of each image's patches (see `PatchEncoder`)."""
        for image in images:
            self._input.check_shape(image.size)
        pixels = self._pixels(images).to(self._device)
        height, width = (side // self._patch for side in pixels.shape[2:])
        tokens_ntc = self._tokens(layer, pixel_values=pixels, **self._arguments)[:, self._prefix :]
        return list(tokens_ntc.transpose(1, 2).reshape(len(images), self.dim, height, width))

    def _tokens(self, layer: int | None, **inputs: Any) -> torch.Tensor:
        output = self._model(**inputs, output_hidden_states=layer is not None)
        return output.last_hidden_state if layer is None else output.hidden_states[layer]

    def edges(self, size: tuple[int, int], grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the edges of the patches (see `PatchEncoder`)."""
        return self._input.edges(size, np.arange(grid[0] + 1) * self._patch, to_nearest=False)


class NaFlexEncoder(HuggingFaceEncoder):
    """SigLIP 2 with the image's own aspect ratio (NaFlex): at most `max_patches` patches per image."""

    def __init__(
        self, folder: Path, fields: Mapping[str, Any], state: Tensors, options: InputOptions, device: str, max_patches: int | None
    ) -> None:
        self._wanted = max_patches
        super().__init__(folder, fields, state, options, device)

    def _settle(self, folder: Path, options: InputOptions, trained_side: Any) -> None:
        self._processor = naflex_processor(folder, options, self._patch, self._wanted)

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings of the input, under the names of their options."""
        from opt_ds.features.image_input import INTERPOLATIONS

        own = self._processor
        return {
            "max_patches": own.max_num_patches,
            "interpolation": next(name for name, number in INTERPOLATIONS.items() if number == own.resample),
            "mean": list(own.image_mean),
            "std": list(own.image_std),
        }

    def maps(self, images: Sequence[Image.Image], layer: int | None) -> list[torch.Tensor]:
        """Return the features of each image's patches (see `PatchEncoder`)."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._device)
        tokens_ntc = self._tokens(layer, **inputs)
        grids = inputs["spatial_shapes"].tolist()
        return [own[: h * w].T.reshape(self.dim, h, w) for own, (h, w) in zip(tokens_ntc, grids, strict=True)]

    def edges(self, size: tuple[int, int], grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the edges of the patches (see `PatchEncoder`). They cover the whole image."""
        height, width = grid
        return np.arange(width + 1) / width, np.arange(height + 1) / height


class TimmEncoder(PatchEncoder):
    """A vision transformer of timm, from its weights and, as far as there is one, its config.json."""

    package = "timm"

    def __init__(
        self, name: str, fields: Mapping[str, Any] | None, state: Tensors, where: Path, options: InputOptions, device: str
    ) -> None:
        try:
            import timm
        except ImportError:
            raise UserError(f"--image-weights {where}: timm is not installed: pip install 'opt_ds[timm]'") from None
        if not timm.is_model(name):
            raise UserError(f'{where}: "{name}" is not a model of timm{did_you_mean(name, timm.list_models())}')
        self._device = device
        own = timm_input(_timm_settings(name, fields, where))
        self._network = _timm_network(name, (fields or {}).get("model_args", {}), where)
        fit(self._network, without(state, r"head(_dist)?\..*"), str(where), f"timm's {name}")
        self._input: ImageInput = settle(options, own, where)
        self._pixels = timm_pixels(self._input)
        self._resize(options, where)
        self._network.to(device)
        self.num_layers, self.dim = len(self._network.blocks), int(self._network.num_features)
        self._check(name, where)
        self._patch = int(self._network.patch_embed.feat_ratio())
        self.patches = self._input.side // self._patch

    def _resize(self, options: InputOptions, where: Path) -> None:
        """Resize the position embeddings to the input."""
        size = (self._input.side, self._input.side)
        trained = getattr(self._network.patch_embed, "img_size", None)
        if trained is None or tuple(trained) == size or getattr(self._network, "dynamic_img_size", False):
            return
        check_side(self._input.side, _side(trained, where, "img_size"), options, where)
        try:
            self._network.set_input_size(img_size=size)
        except Exception:  # of many types, if the network has no such method or cannot have this size
            raise UserError(f"{where}: its input has {trained[0]} x {trained[1]} pixels: set image.side={trained[0]}") from None

    def _check(self, name: str, where: Path) -> None:
        """Raise UserError unless the network returns one token per patch, after `num_prefix_tokens` others."""
        try:
            with torch.inference_mode():
                zeros = torch.zeros(1, 3, self._input.side, self._input.side, device=self._device)
                final_ntc, (map_nchw,) = self._network.forward_intermediates(zeros, indices=[self.num_layers - 1])
            usable = final_ntc.shape[1] - self._network.num_prefix_tokens == map_nchw.shape[2] * map_nchw.shape[3]
            usable &= final_ntc.shape[2] == map_nchw.shape[1] == self.dim
        except Exception:  # of many types, from networks of other kinds
            usable = False
        if not usable:
            raise UserError(f"{where}: timm's {name} does not return one feature per patch: use --images grid, or a plain ViT")

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings of the input, under the names of their options."""
        return self._input.fingerprint()

    def maps(self, images: Sequence[Image.Image], layer: int | None) -> list[torch.Tensor]:
        """Return the features of each image's patches (see `PatchEncoder`)."""
        for image in images:
            self._input.check_shape(image.size)
        pixels = self._pixels(images).to(self._device)
        final_ntc, (map_nchw,) = self._network.forward_intermediates(pixels, indices=[(layer or self.num_layers) - 1])
        if layer is not None:
            return list(map_nchw)
        tokens_ntc = final_ntc[:, self._network.num_prefix_tokens :]
        return list(tokens_ntc.transpose(1, 2).reshape(map_nchw.shape))

    def edges(self, size: tuple[int, int], grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the edges of the patches (see `PatchEncoder`)."""
        return self._input.edges(size, np.arange(grid[0] + 1) * self._patch, to_nearest=True)


def _timm_network(name: str, arguments: Any, where: Path) -> Any:
    import timm

    try:
        arguments = {key: value for key, value in arguments.items() if key not in _NOT_OURS}
        network: Any = timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval()
    except Exception:  # of many types, for arguments that the network does not have
        raise UserError(f"{where}: its model_args cannot be used by timm's {name}: download config.json again") from None
    for needed in ("blocks", "num_prefix_tokens", "patch_embed", "forward_intermediates", "num_features"):
        if not hasattr(network, needed):
            raise UserError(f"{where}: timm's {name} is no vision transformer of patches: use --images grid, or a plain ViT")
    return network


def _timm_settings(name: str, fields: Mapping[str, Any] | None, where: Path) -> Mapping[str, Any]:
    """Return timm's `pretrained_cfg` of the weights: from config.json, or timm's own if `name` has a tag, otherwise none."""
    import timm

    if fields is not None:
        settings = fields.get("pretrained_cfg", fields)  # older files have its fields at the top
        return settings if isinstance(settings, dict) else {}
    if "." not in name:
        return {}
    try:
        found = timm.models.get_pretrained_cfg(name)
        assert found is not None, "it raises for an unknown tag"
        return found.to_dict()
    except (RuntimeError, AttributeError):
        known = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        raise UserError(f'{where}: timm knows no weights "{name}"{did_you_mean(name, known)}: name one it knows') from None


def _side(value: Any, where: Path, key: str) -> int:
    """Return a side of a square, which is given as a number or twice. UserError for a rectangle."""
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise UserError(f"{where}: its {key} is {value}, which is not a square: use another model")
    return int(sides[0])
