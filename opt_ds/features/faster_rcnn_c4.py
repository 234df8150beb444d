"""Detectron2's Faster R-CNN C4 on torchvision's parts: proposals on res4, and res5 on the pooled proposals.

The settings are those of Detectron2's Base-RCNN-C4 for ImageNet's ResNets: anchors of 32 to 512 pixels at a stride of 16,
RoIAlign to 14 x 14 with the half-pixel shift, and the mean of res5's map as the feature of a region.

Shape letters: P proposals, C channels.
"""

from typing import Any

import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align
from torchvision.ops.misc import FrozenBatchNorm2d

_STRIDE = 16  # of res4
_POOLED = 14
_SIZES, _RATIOS = ((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)
_PROPOSALS_PER_PASS = 64  # bounds the memory of res5


class C4Backbone(nn.Module):
    """A ResNet up to res4, whose map is called "0"."""

    def __init__(self, resnet: Any) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(resnet, {"layer3": "0"})
        self.out_channels = resnet.layer4[0].conv1.in_channels

    def forward(self, images_nchw: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the map of res4."""
        maps: dict[str, torch.Tensor] = self.body(images_nchw)
        return maps


class PooledRes5(nn.Module):
    """The features [P, C] of proposals: RoIAlign on res4, then res5, then the mean over its map."""

    def __init__(self, layer4: nn.Module, sampling_ratio: int) -> None:
        super().__init__()
        self.layer4, self._sampling_ratio = layer4, sampling_ratio

    def forward(
        self, maps: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """Return the features of the boxes of all images."""
        image = torch.cat([torch.full_like(part[:, :1], index) for index, part in enumerate(boxes)])
        rois = torch.cat([image, torch.cat(boxes)], 1).to(maps["0"].dtype)
        return torch.cat([self._features(maps["0"], part) for part in rois.split(_PROPOSALS_PER_PASS)])

    def _features(self, map_nchw: torch.Tensor, rois_p5: torch.Tensor) -> torch.Tensor:
        pooled = roi_align(
            map_nchw, rois_p5, _POOLED, spatial_scale=1 / _STRIDE, sampling_ratio=self._sampling_ratio, aligned=True
        )
        features: torch.Tensor = self.layer4(pooled).mean((2, 3))
        return features


class FixedStrideAnchors(AnchorGenerator):
    """Anchors at every 16th pixel. torchvision's divide the image by the map, which is another stride for most sizes."""

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the anchors of each image, float32 [anchors, 4]."""
        map_nchw = feature_maps[0]
        self.set_cell_anchors(torch.float32, map_nchw.device)
        stride = torch.tensor(_STRIDE, device=map_nchw.device)
        anchors = self.grid_anchors([list(map_nchw.shape[-2:])], [[stride, stride]])
        return [torch.cat(anchors) for _ in image_list.image_sizes]


def build_c4(
    name: str, num_classes: int, feature_size: int, sampling_ratio: int, min_side: int, max_side: int
) -> FasterRCNN:
    """Build the detector with random weights.

    Args:
        name: torchvision's name of the ResNet.
        num_classes: Number of classes with the background.
        feature_size: Channels of res5.
        sampling_ratio: Samples per bin of RoIAlign; 0: as many as the bin has cells.
        min_side: Shorter side of the resized image, in pixels.
        max_side: Upper bound of the longer side, in pixels.
    """
    resnet = get_model(name, weights=None, norm_layer=FrozenBatchNorm2d)
    layer4 = resnet.layer4
    model = FasterRCNN(
        C4Backbone(resnet),
        min_size=min_side,
        max_size=max_side,
        rpn_anchor_generator=FixedStrideAnchors(_SIZES, _RATIOS),
        rpn_pre_nms_top_n_test=6000,
        rpn_post_nms_top_n_test=1000,
        box_head=nn.Identity(),
        box_predictor=FastRCNNPredictor(feature_size, num_classes),
    )
    model.roi_heads.box_roi_pool = PooledRes5(layer4, sampling_ratio)
    model.transform.size_divisible = 1  # only FPN pads
    return model
