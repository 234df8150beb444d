"""Detectron2's Faster R-CNN C4: equal to a plain computation from Detectron2's public description, under its keys.

Detectron2 itself is in no package registry, so the reference is written here: its Base-RCNN-C4 in a few functions, with none of
the code of the extractor.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.ops import nms, roi_align

from opt_ds.errors import UserError
from opt_ds.features.detector import FasterRCNNExtractor, FasterRCNNOptions, build_faster_rcnn

WIDTH, HEIGHT = 120, 88  # the map of res4 is 8 x 6: 16 is not the quotient of the sizes
CLASSES, PROPOSALS = 7, 12
State = dict[str, torch.Tensor]


def random_state(attributes: bool = False) -> State:
    """A ResNet-50 C4 as Detectron2 names its tensors, without "bottom_up", with colours in the order BGR."""
    torch.manual_seed(0)
    state: State = {}

    def convolution(name: str, inner: int, outer: int, kernel: int, scale: float = 1.0) -> None:
        state[f"{name}.weight"] = torch.randn(outer, inner, kernel, kernel) * scale * math.sqrt(2 / (inner * kernel**2))
        state[f"{name}.norm.weight"] = 1 + 0.1 * torch.randn(outer)
        state[f"{name}.norm.bias"] = 0.1 * torch.randn(outer)
        state[f"{name}.norm.running_mean"] = 0.1 * torch.randn(outer)
        state[f"{name}.norm.running_var"] = 1 + 0.1 * torch.rand(outer)

    convolution("backbone.stem.conv1", 3, 64, 7, scale=0.02)
    inner = 64
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        place, width = "roi_heads.res5" if stage == 5 else f"backbone.res{stage}", 64 * 2 ** (stage - 2)
        for block in range(blocks):
            if not block:
                convolution(f"{place}.{block}.shortcut", inner, 4 * width, 1)
            convolution(f"{place}.{block}.conv1", inner, width, 1)
            convolution(f"{place}.{block}.conv2", width, width, 3)
            convolution(f"{place}.{block}.conv3", width, 4 * width, 1, scale=0.3)
            inner = 4 * width
    for name, shape, scale in (
        ("proposal_generator.rpn_head.conv", (1024, 1024, 3, 3), 0.01),
        ("proposal_generator.rpn_head.objectness_logits", (15, 1024, 1, 1), 0.03),
        ("proposal_generator.rpn_head.anchor_deltas", (60, 1024, 1, 1), 0.005),
        ("roi_heads.box_predictor.cls_score", (CLASSES + 1, 2048), 0.03),
        ("roi_heads.box_predictor.bbox_pred", (4 * CLASSES, 2048), 0.03),
    ):
        state[f"{name}.weight"] = scale * torch.randn(shape)
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0])
    if attributes:
        state["roi_heads.attribute_predictor.attr_score.weight"] = torch.zeros(400, 512)
    return state


class Reference:
    """Base-RCNN-C4. `fault` computes one step wrongly, to show that the comparison would notice."""

    def __init__(self, state: State, sampling_ratio: int = 0, fault: str = "") -> None:
        self.state, self.sampling_ratio, self.fault = state, sampling_ratio, fault

    def convolution(self, x: torch.Tensor, name: str, stride: int = 1, padding: int = 0) -> torch.Tensor:
        x = F.conv2d(x, self.state[f"{name}.weight"], stride=stride, padding=padding)
        weight, bias, mean, variance = (
            self.state[f"{name}.norm.{key}"].view(1, -1, 1, 1) for key in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def stage(self, x: torch.Tensor, place: str, blocks: int, stride: int) -> torch.Tensor:
        for block in range(blocks):
            name, own = f"{place}.{block}", stride if block == 0 else 1
            strides = (1, own) if self.fault == "stride in the 3x3 convolution" else (own, 1)
            y = F.relu(self.convolution(x, f"{name}.conv1", strides[0]))
            y = F.relu(self.convolution(y, f"{name}.conv2", strides[1], padding=1))
            y = self.convolution(y, f"{name}.conv3")
            x = F.relu(y + (self.convolution(x, f"{name}.shortcut", own) if block == 0 else x))
        return x

    def backbone(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        if self.fault != "RGB":
            pixels = pixels.flip(0)
        x = (pixels - torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1))[None]
        if self.fault == "padded to 32":
            x = F.pad(x, (0, 128 - WIDTH, 0, 96 - HEIGHT))
        x = F.max_pool2d(F.relu(self.convolution(x, "backbone.stem.conv1", 2, 3)), 3, stride=2, padding=1)
        for stage, blocks in ((2, 3), (3, 4), (4, 6)):
            x = self.stage(x, f"backbone.res{stage}", blocks, 1 if stage == 2 else 2)
        return x

    def layer(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def proposals(self, map_nchw: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.layer(map_nchw, "proposal_generator.rpn_head.conv"))
        logits = self.layer(hidden, "proposal_generator.rpn_head.objectness_logits")[0].permute(1, 2, 0).flatten()
        deltas = self.layer(hidden, "proposal_generator.rpn_head.anchor_deltas")[0].permute(1, 2, 0).reshape(-1, 4)
        height, width = map_nchw.shape[-2:]
        stride = HEIGHT // height if self.fault == "stride of the quotient" else 16
        anchors = []
        for y, x, size, ratio in itertools.product(range(height), range(width), (32, 64, 128, 256, 512), (0.5, 1, 2)):
            w = math.sqrt(size * size / ratio)
            corners = [stride * x - w / 2, stride * y - w * ratio / 2, stride * x + w / 2, stride * y + w * ratio / 2]
            anchors.append([round(corner) for corner in corners] if self.fault == "rounded anchors" else corners)
        boxes = self.decode(torch.tensor(anchors), deltas, (1, 1, 1, 1))
        order = logits.argsort(descending=True, stable=True)
        boxes, logits = boxes[order], logits[order]
        large = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes, logits = boxes[large], logits[large]
        return boxes[nms(boxes, logits, 0.7)][:PROPOSALS]

    def decode(self, boxes: torch.Tensor, deltas: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
        dx, dy, dw, dh = (deltas / torch.tensor(weights)).unbind(-1)
        w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        x, y = boxes[:, 0] + w / 2 + dx * w, boxes[:, 1] + h / 2 + dy * h
        limit = math.log(1000 / 16)
        w, h = w * dw.clamp(max=limit).exp(), h * dh.clamp(max=limit).exp()
        found = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        return torch.minimum(found.clamp(min=0), torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]))

    def features(self, map_nchw: torch.Tensor, proposals: torch.Tensor) -> torch.Tensor:
        pooled = roi_align(map_nchw, [proposals], 14, 1 / 16, self.sampling_ratio, aligned=self.fault != "no half pixel")
        return self.stage(pooled, "roi_heads.res5", 3, 2).mean((2, 3))

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> dict[str, torch.Tensor]:
        map_nchw = self.backbone(image)
        proposals = self.proposals(map_nchw)
        features = self.features(map_nchw, proposals)
        head = "roi_heads.box_predictor"
        scores = F.linear(features, self.state[f"{head}.cls_score.weight"], self.state[f"{head}.cls_score.bias"]).softmax(1)
        deltas = F.linear(features, self.state[f"{head}.bbox_pred.weight"], self.state[f"{head}.bbox_pred.bias"])
        best = scores[:, :-1].argmax(1)  # the background is the last class
        chosen = deltas.view(len(deltas), -1, 4)[torch.arange(len(deltas)), best]
        boxes = self.decode(proposals, chosen, (10, 10, 5, 5))
        return {"features": features, "scores": scores, "labels": best, "boxes": boxes, "proposals": proposals}


def photo(seed: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (11, 15, 3), "uint8")
    return Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def state() -> State:
    return random_state()


@pytest.fixture(scope="module")
def extractor(state: State, tmp_path_factory: pytest.TempPathFactory) -> FasterRCNNExtractor:
    file = tmp_path_factory.mktemp("c4") / "c4.pth"
    torch.save({"model": state}, file)
    return few_proposals(FasterRCNNExtractor(options(file)))


def options(file: Path) -> FasterRCNNOptions:
    return FasterRCNNOptions(weights=file, min_side=HEIGHT, max_side=WIDTH, confidence=0.0, min_regions=1, max_regions=100)


def few_proposals(extractor: FasterRCNNExtractor) -> FasterRCNNExtractor:
    extractor._model.rpn._post_nms_top_n = {"training": PROPOSALS, "testing": PROPOSALS}
    return extractor


def features_of(extractor: FasterRCNNExtractor, image: Image.Image) -> tuple[torch.Tensor, Any]:
    """The features of all proposals in fp32, and the regions that the extractor returns."""
    seen: list[torch.Tensor] = []
    handle = extractor._model.roi_heads.box_roi_pool.register_forward_hook(lambda *call: seen.append(call[2]))
    (regions,) = extractor.extract([image])
    handle.remove()
    return seen[0], regions


@pytest.fixture(scope="module")
def found(extractor: FasterRCNNExtractor) -> tuple[torch.Tensor, Any]:
    return features_of(extractor, photo())


def test_features_boxes_classes_and_scores_are_the_references(
    extractor: FasterRCNNExtractor, state: State, found: tuple[torch.Tensor, Any]
) -> None:
    expected = Reference(state)(photo())
    assert len(expected["proposals"]) == PROPOSALS and len(expected["labels"].unique()) > 1
    features, regions = found
    scale = float(expected["features"].abs().max())
    assert 0.05 < scale < 6e4
    torch.testing.assert_close(features / scale, expected["features"] / scale, rtol=0, atol=1e-5)
    own_scores = expected["scores"].gather(1, expected["labels"][:, None])[:, 0]
    for row, feature in enumerate(regions.features):
        place = int((features.half() == torch.from_numpy(feature)).all(1).nonzero()[0])
        assert regions.labels[row] == expected["labels"][place] + 1, "0 is the background"
        assert abs(float(regions.scores[row]) - float(own_scores[place])) < 1e-3
        box = expected["boxes"][place] / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
        np.testing.assert_allclose(regions.boxes[row, :4], box.numpy(), atol=1e-4)
    assert len(regions.features) >= 5 and (np.diff(regions.scores) <= 0).all()
    assert (extractor.dim, extractor.num_classes) == (2048, CLASSES + 1)
    assert extractor.fingerprint()["backbone"] == "torchvision/resnet50_c4"


@pytest.mark.parametrize(
    "fault",
    ["stride in the 3x3 convolution", "RGB", "padded to 32", "stride of the quotient", "rounded anchors", "no half pixel"],
)
def test_a_wrong_computation_would_be_noticed(fault: str, state: State, found: tuple[torch.Tensor, Any]) -> None:
    wrong, (features, _) = Reference(state, fault=fault)(photo())["features"], found
    scale = float(features.abs().max())
    assert features.shape != wrong.shape or float((features - wrong).abs().max()) > 1e-3 * scale


def test_visual_genome_models_with_attributes_pool_two_samples_per_bin(found: tuple[torch.Tensor, Any], tmp_path: Path) -> None:
    with_attributes = random_state(attributes=True)
    torch.save({"model": with_attributes}, tmp_path / "vg.pth")
    features, _ = features_of(few_proposals(FasterRCNNExtractor(options(tmp_path / "vg.pth"))), photo())
    expected = Reference(with_attributes, sampling_ratio=2)(photo())["features"]
    scale = float(expected.abs().max())
    torch.testing.assert_close(features / scale, expected / scale, rtol=0, atol=1e-5)
    assert float((features - found[0]).abs().max()) > 1e-3 * scale, "the ratio matters"


def test_an_image_has_the_same_regions_beside_an_unreadable_one(extractor: FasterRCNNExtractor) -> None:
    (alone,) = extractor.extract([photo(4)])
    again, none = extractor.extract([photo(4), None])
    assert none is None and alone is not None and again is not None
    assert np.array_equal(alone.features, again.features) and np.array_equal(alone.boxes, again.boxes)


def test_models_converted_from_caffe_and_incomplete_ones_are_refused(state: State) -> None:
    head = "proposal_generator.rpn_head"
    logits = f"{head}.objectness_logits"
    two = {f"{logits}.weight": torch.zeros(30, 1024, 1, 1), f"{logits}.bias": torch.zeros(30)}
    narrow = {f"{head}.conv.weight": torch.zeros(512, 1024, 3, 3)}
    for change in (two, narrow):
        with pytest.raises(UserError, match="here: a C4 model converted from Caffe, which computes otherwise: extract"):
            build_faster_rcnn({**state, **change}, "here", 96, 128)
    lacking = {key: value for key, value in state.items() if key != "roi_heads.res5.2.conv3.weight"}
    with pytest.raises(UserError, match=r"here: .* its weights lack roi_heads.box_roi_pool.layer4.2.conv3.weight"):
        build_faster_rcnn(lacking, "here", 96, 128)
