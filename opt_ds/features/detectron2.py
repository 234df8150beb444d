"""Convert checkpoints in Detectron2's Faster R-CNN layouts, FPN and C4, to torchvision's.

The keys are renamed as follows:

    backbone.[bottom_up.]stem.conv1 (.norm)            backbone.body.conv1 (bn1), input channels BGR -> RGB
    backbone.[bottom_up.]res2..res5.B.convN (.norm)    backbone.body.layer1..layer4.B.convN (bnN)
    backbone.[bottom_up.]resS.B.shortcut (.norm)       backbone.body.layerL.B.downsample.0 (.1)
    roi_heads.res5.B… (C4)                             roi_heads.box_roi_pool.layer4.B… (see faster_rcnn_c4.py)
    backbone.fpn_lateral2..5, fpn_output2..5           backbone.fpn.inner_blocks.0..3.0, layer_blocks.0..3.0
    proposal_generator.rpn_head.conv                   rpn.head.conv.0.0
    proposal_generator.rpn_head.objectness_logits      rpn.head.cls_logits
    proposal_generator.rpn_head.anchor_deltas          rpn.head.bbox_pred
    roi_heads.box_head.fc1, fc2                        roi_heads.box_head.fc6, fc7
    roi_heads.box_predictor.cls_score                  the same, with the background's row moved from last to first
    roi_heads.box_predictor.bbox_pred                  the same, with four rows for the background prepended

Attribute heads of Visual Genome models, pixel_mean, pixel_std and anchors are ignored. `adapt` makes the network
compute like Detectron2's with its own ImageNet ResNets: stride in the 1x1 convolutions, pixels 0..255 minus the mean,
anchors not rounded, RoIAlign with the half-pixel shift. It was written from Detectron2's public source and not compared
with a running Detectron2. C4 models that were converted from Caffe compute otherwise under the same keys. They have two
objectness values per anchor, or proposals of 512 channels, and are refused.
"""

import re

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import roi_align

from opt_ds.errors import UserError
from opt_ds.features.faster_rcnn_c4 import C4Backbone

_MARKS = ("backbone.bottom_up.", "backbone.stem.", "proposal_generator.", "backbone.res2.")
_RES5 = "roi_heads.res5."
_ATTRIBUTES = re.compile(r"roi_heads\..*attr")
_MEAN_RGB = (123.675, 116.28, 103.53)
_LEFT_OUT = re.compile(r"pixel_(mean|std)|.*anchor_generator|.*attr|.*cls_embed|.*num_batches_tracked")
_BLOCK = r"(?P<place>backbone\.(?:bottom_up\.)?|roi_heads\.)res(?P<stage>\d)\.(?P<block>\d+)"
_RENAMES = (
    (r"backbone\.(?:bottom_up\.)?stem\.conv1\.norm\.", "backbone.body.bn1."),
    (r"backbone\.(?:bottom_up\.)?stem\.conv1\.", "backbone.body.conv1."),
    (r"backbone\.fpn_lateral(\d)\.", lambda m: f"backbone.fpn.inner_blocks.{int(m[1]) - 2}.0."),
    (r"backbone\.fpn_output(\d)\.", lambda m: f"backbone.fpn.layer_blocks.{int(m[1]) - 2}.0."),
    (r"proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (r"roi_heads\.box_head\.fc1\.", "roi_heads.box_head.fc6."),
    (r"roi_heads\.box_head\.fc2\.", "roi_heads.box_head.fc7."),
    (rf"{_BLOCK}\.shortcut\.norm\.", lambda m: f"{_block(m)}.downsample.1."),
    (rf"{_BLOCK}\.shortcut\.", lambda m: f"{_block(m)}.downsample.0."),
    (rf"{_BLOCK}\.conv(?P<conv>\d)\.norm\.", lambda m: f"{_block(m)}.bn{m['conv']}."),
    (rf"{_BLOCK}\.conv(?P<conv>\d)\.", lambda m: f"{_block(m)}.conv{m['conv']}."),
)


def is_detectron2(state: dict[str, torch.Tensor]) -> bool:
    """Return whether the keys are Detectron2's."""
    return any(key.startswith(_MARKS) for key in state)


def is_c4(state: dict[str, torch.Tensor]) -> bool:
    """Return whether Detectron2's keys are those of a model without FPN, with res5 in the heads."""
    return any(key.startswith(_RES5) for key in state)


def c4_sampling_ratio(state: dict[str, torch.Tensor]) -> int:
    """Return the samples per bin of RoIAlign: Detectron2's 0 (adaptive), or 2 for Visual Genome models with attributes.

    The weights do not state it. Those models are bottom-up-attention.pytorch's, whose configuration (base-d2.yaml) has 2.
    """
    return 2 if any(_ATTRIBUTES.match(key) for key in state) else 0


def to_torchvision(state: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Return the tensors under torchvision's keys. Raise UserError for a model that is neither FPN nor Detectron2's C4."""
    if is_c4(state):
        _refuse_caffe(state, where)
    elif not any(key.startswith("backbone.fpn_lateral") for key in state):
        raise UserError(
            f"{where}: a Detectron2 model with neither FPN nor res5 in its heads: give an FPN or C4 checkpoint of Faster R-CNN"
        )
    refuse_other_colours(state, where)
    renamed = {_rename(key): tensor for key, tensor in state.items() if not _LEFT_OUT.match(key)}
    stem, scores, deltas = (
        "backbone.body.conv1.weight",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    )
    try:
        renamed[stem] = renamed[stem].flip(1)
        num_classes = len(renamed[f"{scores}.bias"]) - 1
        for part in ("weight", "bias"):
            renamed[f"{scores}.{part}"] = renamed[f"{scores}.{part}"].roll(1, 0)
            own = renamed[f"{deltas}.{part}"]
            own = own.repeat(num_classes, *[1] * (own.dim() - 1)) if len(own) == 4 else own  # class-agnostic boxes
            renamed[f"{deltas}.{part}"] = torch.cat([torch.zeros_like(own[:4]), own])
    except KeyError as error:
        raise UserError(f"{where}: not a complete Detectron2 Faster R-CNN (no {error.args[0]})") from None
    return renamed


def _refuse_caffe(state: dict[str, torch.Tensor], where: str) -> None:
    head = "proposal_generator.rpn_head"
    objectness, deltas = (state.get(f"{head}.{name}.bias") for name in ("objectness_logits", "anchor_deltas"))
    hidden = state.get(f"{head}.conv.weight")
    if objectness is None or deltas is None or hidden is None:
        return
    if 4 * len(objectness) != len(deltas) or hidden.shape[0] != hidden.shape[1]:
        raise UserError(
            f"{where}: a C4 model converted from Caffe, which computes otherwise: extract its features with "
            "bottom-up-attention.pytorch, and give the .npz files with --images region_files"
        )


def refuse_other_colours(state: dict[str, torch.Tensor], where: str) -> None:
    """Raise UserError if the checkpoint has a pixel mean or standard deviation other than those that `adapt` sets."""
    for name, usual in (("pixel_mean", _MEAN_RGB[::-1]), ("pixel_std", (1.0, 1.0, 1.0))):
        if name in state and not torch.allclose(state[name].flatten().float(), torch.tensor(usual), atol=0.01):
            found = [round(value, 3) for value in state[name].flatten().tolist()]
            raise UserError(f"{where}: its {name} is {found}, only {list(usual)} is supported: use a model of ImageNet's ResNets")


def adapt(model: FasterRCNN) -> None:
    """Make torchvision's network compute like Detectron2's."""
    model.transform.image_mean = [value / 255 for value in _MEAN_RGB]
    model.transform.image_std = [1 / 255] * 3
    c4 = isinstance(model.backbone, C4Backbone)
    body = model.backbone.body
    for layer in (body.layer2, body.layer3, model.roi_heads.box_roi_pool.layer4 if c4 else body.layer4):
        if hasattr(layer[0], "conv3"):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    generator = model.rpn.anchor_generator
    generator.cell_anchors = [
        _anchors(sizes, ratios) for sizes, ratios in zip(generator.sizes, generator.aspect_ratios, strict=True)
    ]
    if not c4:
        model.roi_heads.box_roi_pool = _AlignedPooler()


class _AlignedPooler(nn.Module):
    """RoIAlign to 7 x 7 with the half-pixel shift; box size selects the FPN level (Lin et al. 2017, eq. 1)."""

    def forward(
        self, maps: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        image = torch.cat([torch.full_like(part[:, :1], index) for index, part in enumerate(boxes)])
        corners = torch.cat(boxes)
        sides = ((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])).sqrt()
        levels = (4 + torch.log2(sides / 224 + 1e-8)).floor().clamp(2, 5)
        channels = maps["0"].shape[1]
        pooled = corners.new_zeros((len(corners), channels, 7, 7), dtype=maps["0"].dtype)
        rois = torch.cat([image, corners], 1)
        for level, key in enumerate("0123", 2):
            chosen = torch.where(levels == level)[0]
            own = rois[chosen].to(maps[key].dtype)
            pooled[chosen] = roi_align(maps[key], own, 7, spatial_scale=0.5**level, sampling_ratio=-1, aligned=True)
        return pooled


def _anchors(sizes: tuple[int, ...], ratios: tuple[float, ...]) -> torch.Tensor:
    halves = [((size**2 / ratio) ** 0.5 / 2, (size**2 * ratio) ** 0.5 / 2) for size in sizes for ratio in ratios]
    return torch.tensor([(-width, -height, width, height) for width, height in halves])


def _block(match: re.Match[str]) -> str:
    place = "roi_heads.box_roi_pool" if match["place"].startswith("roi_heads") else "backbone.body"
    return f"{place}.layer{int(match['stage']) - 1}.{match['block']}"


def _rename(key: str) -> str:
    for pattern, new in _RENAMES:
        renamed, count = re.subn(rf"^{pattern}", new, key)
        if count:
            return renamed
    return key
