"""Convert checkpoints in Detectron2's Faster R-CNN FPN layout to torchvision's.

The keys are renamed as follows:

    backbone.bottom_up.stem.conv1 (.norm)              backbone.body.conv1 (bn1), input channels BGR -> RGB
    backbone.bottom_up.res2..res5.B.convN (.norm)      backbone.body.layer1..layer4.B.convN (bnN)
    backbone.bottom_up.resS.B.shortcut (.norm)         backbone.body.layerL.B.downsample.0 (.1)
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
with a running Detectron2.
"""

import re

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import roi_align

from opt_ds.errors import UserError

_MARK = "backbone.bottom_up."
_MEAN_RGB = (123.675, 116.28, 103.53)
_LEFT_OUT = re.compile(r"pixel_(mean|std)|.*anchor_generator|.*attr|.*cls_embed|.*num_batches_tracked")
_RENAMES = (
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.", "backbone.body.bn1."),
    (r"backbone\.bottom_up\.stem\.conv1\.", "backbone.body.conv1."),
    (r"backbone\.fpn_lateral(\d)\.", lambda m: f"backbone.fpn.inner_blocks.{int(m[1]) - 2}.0."),
    (r"backbone\.fpn_output(\d)\.", lambda m: f"backbone.fpn.layer_blocks.{int(m[1]) - 2}.0."),
    (r"proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (r"roi_heads\.box_head\.fc1\.", "roi_heads.box_head.fc6."),
    (r"roi_heads\.box_head\.fc2\.", "roi_heads.box_head.fc7."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.norm\.", lambda m: f"{_block(m)}.downsample.1."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.", lambda m: f"{_block(m)}.downsample.0."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.norm\.", lambda m: f"{_block(m)}.bn{m[3]}."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.", lambda m: f"{_block(m)}.conv{m[3]}."),
)


def is_detectron2(state: dict[str, torch.Tensor]) -> bool:
    """Return whether the keys are Detectron2's."""
    return any(key.startswith((_MARK, "proposal_generator.", "backbone.res2.")) for key in state)


def to_torchvision(state: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Return the tensors under torchvision's keys. Raise UserError for a model without FPN."""
    if not any(key.startswith("backbone.fpn_lateral") for key in state):
        raise UserError(
            f"{where}: a Detectron2 model without FPN (a C4 one, its features come from res5): "
            "give an FPN checkpoint, Detectron2's or torchvision's"
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
    for layer in (model.backbone.body.layer2, model.backbone.body.layer3, model.backbone.body.layer4):
        if hasattr(layer[0], "conv3"):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    generator = model.rpn.anchor_generator
    generator.cell_anchors = [
        _anchors(sizes, ratios) for sizes, ratios in zip(generator.sizes, generator.aspect_ratios, strict=True)
    ]
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
    return f"backbone.body.layer{int(match[1]) - 1}.{match[2]}"


def _rename(key: str) -> str:
    for pattern, new in _RENAMES:
        renamed, count = re.subn(rf"^{pattern}", new, key)
        if count:
            return renamed
    return key
