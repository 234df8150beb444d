"""Faster R-CNN region features in the style of "bottom-up attention": 10 to 100 regions, features after the box head.

The selection rule is that of Anderson et al. 2018 (arXiv 1707.07998): confidence 0.2, at least 10 and at most 100
regions.

Shape letters: P proposals, K classes (0 = background), R regions.
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import batched_nms

from opt_ds.config.section import Section
from opt_ds.errors import UserError
from opt_ds.features import detectron2
from opt_ds.features.extractors import load_state_dict, weights_fingerprint
from opt_ds.features.faster_rcnn_c4 import C4Backbone, build_c4
from opt_ds.features.regions import RegionExtractor, RegionFeatures, boxes_with_size
from opt_ds.store.schema import BOX_SIZE
from opt_ds.weights import fit

# (has bottleneck blocks, number of blocks in the third stage) -> architecture. The depths differ most in the third
# stage.
_RESNETS = {
    (False, 2): "resnet18",
    (False, 6): "resnet34",
    (True, 6): "resnet50",
    (True, 23): "resnet101",
    (True, 36): "resnet152",
}
_FPN_CHANNELS = 256
_NMS_IOU = 0.5
_GPU_BATCH = 8


class FasterRCNNOptions(Section):
    """The options of faster_rcnn. Those of the selection are those of "bottom-up attention"."""

    weights: Path | None = Field(
        None,
        description="State dict file in torchvision's layout (its own COCO models have 91 classes, Visual Genome models 1,601) "
        "or in Detectron2's FPN or C4 layout (see detectron2.py).",
    )
    min_regions: int = Field(10, ge=1, description="Smallest number of regions per image, as far as there are proposals.")
    max_regions: int = Field(100, ge=1, description="Largest number of regions per image.")
    confidence: float = Field(0.2, description="Regions below this score are dropped, except to reach `min_regions`.")
    min_side: int = Field(600, ge=1, description="Shorter side of the resized image, in pixels.")
    max_side: int = Field(1000, ge=1, description="Upper bound of its longer side, in pixels.")


class FasterRCNNExtractor(RegionExtractor):
    """torchvision's Faster R-CNN on a ResNet, with FPN or C4. Depth, classes and feature size are inferred from the checkpoint.

    The model runs in fp16 on a GPU and in fp32 on a CPU.
    """

    name = "faster_rcnn"
    options = FasterRCNNOptions

    def __init__(self, options: FasterRCNNOptions | None = None, device: str = "cpu") -> None:
        options = options or FasterRCNNOptions()
        weights = options.weights
        state = load_state_dict(weights, "--image-weights of faster_rcnn")
        assert weights is not None, "load_state_dict refuses None"
        self._model, self._backbone = build_faster_rcnn(state, str(weights), options.min_side, options.max_side)
        self._model.to(device)
        self._settings = options.model_dump(exclude={"weights"})
        self._device = device
        self._weights_sha256 = weights_fingerprint(weights)
        self.num_classes = self._model.roi_heads.box_predictor.cls_score.out_features
        self.dim = self._model.roi_heads.box_predictor.cls_score.in_features
        self._empty = (((self.dim,), "float16"), ((BOX_SIZE,), "float32"), ((), "int16"), ((), "float16"))

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint: everything that the features depend on."""
        return {
            "name": self.name,
            "backbone": f"torchvision/{self._backbone}_{'c4' if isinstance(self._model.backbone, C4Backbone) else 'fpn'}",
            "package": "torchvision",
            "version": version("torchvision"),
            "weights_sha256": self._weights_sha256,
            "precision": "fp32" if self._device == "cpu" else "fp16",
            **self._settings,
        }

    @torch.inference_mode()
    def extract(self, inputs: Sequence[Image.Image | None]) -> list[RegionFeatures | None]:
        """Return the regions of each image, best first.

        On a GPU, images of one size share a batch. On a CPU batches bring no speed, so each image runs alone and its
        features do not depend on the other images.
        """
        results: list[RegionFeatures | None] = [None] * len(inputs)
        for indices in _batches(inputs, 1 if self._device == "cpu" else _GPU_BATCH):
            opened = [image for index in indices if (image := inputs[index]) is not None]
            for index, regions in zip(indices, self._regions(opened), strict=True):
                results[index] = regions
        return results

    def _regions(self, opened: Sequence[Image.Image]) -> list[RegionFeatures]:
        tensors = [
            torch.from_numpy(np.array(image)).to(self._device).permute(2, 0, 1).float() / 255 for image in opened
        ]
        images, _ = self._model.transform(tensors)
        with torch.autocast(torch.device(self._device).type, torch.float16, enabled=self._device != "cpu"):
            maps = self._model.backbone(images.tensors)
            proposals, _ = self._model.rpn(images, maps)
            heads = self._model.roi_heads
            features_pc = heads.box_head(heads.box_roi_pool(maps, proposals, images.image_sizes))
            logits_pk, deltas = heads.box_predictor(features_pc)
        counts = [len(boxes) for boxes in proposals]
        # The box coder cannot infer the output shape when there are no boxes.
        boxes_pk4 = heads.box_coder.decode(deltas.float(), proposals) if sum(counts) else deltas.reshape(0, 1, 4)
        parts = zip(
            features_pc.split(counts),
            logits_pk.float().softmax(1).split(counts),
            boxes_pk4.split(counts),
            images.image_sizes,
            strict=True,
        )
        return [self._select(*part) for part in parts]

    def _select(
        self, features_pc: torch.Tensor, scores_pk: torch.Tensor, boxes_pk4: torch.Tensor, size: tuple[int, int]
    ) -> RegionFeatures:
        if not len(features_pc):  # there are no proposals
            return RegionFeatures(*(np.zeros((0, *tail), kind) for tail, kind in self._empty))
        height, width = size
        scale = torch.tensor([width, height, width, height], device=boxes_pk4.device)
        scores, labels = scores_pk[:, 1:].max(1)
        labels = labels + 1
        boxes = boxes_pk4[torch.arange(len(labels)), labels].div(scale).clamp(0, 1)
        kept = batched_nms(boxes, scores, labels, _NMS_IOU)  # sorted by score, best first
        confident = int((scores[kept] >= self._settings["confidence"]).sum())
        kept = kept[: min(max(confident, self._settings["min_regions"]), self._settings["max_regions"])]
        return RegionFeatures(
            features_pc[kept].to(torch.float16).cpu().numpy(),
            boxes_with_size(boxes[kept].cpu().numpy()),
            labels[kept].to(torch.int16).cpu().numpy(),
            scores[kept].to(torch.float16).cpu().numpy(),
        )


def _batches(inputs: Sequence[Image.Image | None], most: int) -> list[list[int]]:
    """Return the indices of the images of each batch.

    The images of a batch have one size; there are at most `most` of them.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(inputs):
        if image is not None:
            by_size.setdefault(image.size, []).append(index)
    return [group[start : start + most] for group in by_size.values() for start in range(0, len(group), most)]


def build_faster_rcnn(
    state: dict[str, torch.Tensor], where: str, min_side: int, max_side: int
) -> tuple[FasterRCNN, str]:
    """Build the detector that fits a state dict and load its weights.

    Args:
        state: State dict in torchvision's or Detectron2's layout.
        where: Name of the file, for error messages.
        min_side: Shorter side of the resized image, in pixels.
        max_side: Upper bound of the longer side, in pixels.

    Returns:
        The detector in evaluation mode, and the name of its backbone.

    Raises:
        UserError: The state dict fits no supported detector.
    """
    foreign = detectron2.is_detectron2(state)
    sampling_ratio = detectron2.c4_sampling_ratio(state) if detectron2.is_c4(state) else None
    if foreign:
        state = detectron2.to_torchvision(state, where)
    try:
        bottleneck = "backbone.body.layer3.0.conv3.weight" in state
        blocks = len({key.split(".")[3] for key in state if key.startswith("backbone.body.layer3.")})
        num_classes = len(state["roi_heads.box_predictor.cls_score.bias"])
        feature_size = int(state["roi_heads.box_predictor.cls_score.weight"].shape[1])
        name = _RESNETS[bottleneck, blocks]
    except KeyError as error:
        raise UserError(
            f"{where}: not a torchvision Faster R-CNN with a ResNet FPN backbone (no {error.args[0]})"
        ) from None
    if sampling_ratio is None:
        model = _build_fpn(name, num_classes, feature_size, min_side, max_side)
    else:
        model = build_c4(name, num_classes, feature_size, sampling_ratio, min_side, max_side)
    fit(model, state, where, f"a Faster R-CNN {name}")
    if foreign:
        detectron2.adapt(model)
    return model.eval(), name


def _build_fpn(name: str, num_classes: int, feature_size: int, min_side: int, max_side: int) -> FasterRCNN:
    """Build torchvision's Faster R-CNN FPN with random weights. The arguments are those of `build_c4`."""
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=0)
    head = TwoMLPHead(_FPN_CHANNELS * 7 * 7, feature_size)
    # The default predictor expects 1024-d features. It is replaced below if this checkpoint has another size.
    model = FasterRCNN(backbone, num_classes=num_classes, min_size=min_side, max_size=max_side, box_head=head)
    predictor = model.roi_heads.box_predictor
    if predictor.cls_score.in_features != feature_size:
        model.roi_heads.box_predictor = type(predictor)(feature_size, num_classes)
    return model
