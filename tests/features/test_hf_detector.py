"""Test object queries of detectors: equality with transformers, the selection of regions, and folders that do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opt_ds.errors import UserError
from opt_ds.features.extractors import choose
from opt_ds.features.hf_detector import HFDetectorExtractor, HFDetectorOptions
from tests.features.models import IMAGENET_COLOURS, image_of_seed, randomise

TOLERANCE = 1e-5
_BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_DETR = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 12, "num_labels": 5, "use_timm_backbone": False,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage4"], **_BACKBONE},
}  # fmt: skip
_INPUT = {
    "do_normalize": True, "do_resize": True, "do_rescale": True, "image_mean": IMAGENET_COLOURS[0],
    "image_std": IMAGENET_COLOURS[1], "size": {"shortest_edge": 64, "longest_edge": 96}, "resample": 2,
}  # fmt: skip
#: model_type -> (class, configuration's class, its values, preprocessor_config.json, place of the head).
DETECTORS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    "detr": (
        "DetrForObjectDetection", "DetrConfig", _DETR,
        {"feature_extractor_type": "DetrFeatureExtractor", **_INPUT, "size": 64, "max_size": 96}, "class_labels_classifier",
    ),
    "conditional_detr": (
        "ConditionalDetrForObjectDetection", "ConditionalDetrConfig", _DETR,
        {"image_processor_type": "ConditionalDetrImageProcessor", **_INPUT}, "class_labels_classifier",
    ),
    "deformable_detr": (
        "DeformableDetrForObjectDetection", "DeformableDetrConfig",
        {**_DETR, "d_model": 32, "num_feature_levels": 2, "disable_custom_kernels": True},
        {"image_processor_type": "DeformableDetrImageProcessor", **_INPUT}, "class_embed",
    ),
    "rt_detr": (
        "RTDetrForObjectDetection", "RTDetrConfig",
        {
            "d_model": 16, "encoder_hidden_dim": 16, "encoder_in_channels": [8, 8, 8], "decoder_in_channels": [16, 16, 16],
            "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "decoder_layers": 2, "num_queries": 12, "num_labels": 5,
            "backbone_config": {"model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"], **_BACKBONE},
        },
        {"image_processor_type": "RTDetrImageProcessor", "do_normalize": False, "size": {"height": 64, "width": 64}},
        "model.decoder.class_embed",
    ),
    "yolos": (
        "YolosForObjectDetection", "YolosConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": [64, 96],
         "patch_size": 16, "num_detection_tokens": 12, "num_labels": 5, "use_mid_position_embeddings": False},
        {"image_processor_type": "YolosImageProcessor", **_INPUT}, "class_labels_classifier",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a detector of `DETECTORS`, saved once."""
    import transformers

    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            kind, config, values, settings, _ = DETECTORS[name]
            torch.manual_seed(0)
            model = getattr(transformers, kind)(getattr(transformers, config)(**values))
            randomise(model)
            saved[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(saved[name])
            (saved[name] / "preprocessor_config.json").write_text(json.dumps(settings))
        return saved[name]

    return folder


def extractor_of(folder: Path, **options: Any) -> HFDetectorExtractor:
    return HFDetectorExtractor(HFDetectorOptions(weights=folder, **options))


@pytest.mark.parametrize("name", DETECTORS)
def test_queries_are_those_of_the_library(folder_of: Callable[[str], Path], name: str) -> None:
    """Features, boxes and scores of transformers' own loader and image processor; the head makes the scores of the features."""
    import transformers

    folder, image = folder_of(name), image_of_seed(1, 90, 60)
    extractor = extractor_of(folder)
    features, corners, scores = extractor.queries(image)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForObjectDetection.from_pretrained(folder).eval()
    with torch.inference_mode():
        output = model(**processor(images=image, return_tensors="pt"))
        assert np.abs(features - output.last_hidden_state[0, -12:].numpy()).max() <= TOLERANCE
        head = model.get_submodule(DETECTORS[name][-1])
        logits = (head[-1] if isinstance(head, torch.nn.ModuleList) else head)(torch.from_numpy(features))
    assert np.abs(logits.numpy() - output.logits[0].numpy()).max() <= 1e-4
    assert features.std() > 0.1 and scores.shape == (12, 5)
    (theirs,) = processor.post_process_object_detection(output, threshold=-1.0, target_sizes=[(1, 1)])
    best = scores.max(1).argmax()
    place = int(theirs["scores"].argmax())
    assert float(theirs["scores"][place]) == pytest.approx(scores[best].max(), abs=TOLERANCE)
    assert int(theirs["labels"][place]) == scores[best].argmax()
    assert np.abs(theirs["boxes"][place].clamp(0, 1).numpy() - corners[best]).max() <= TOLERANCE
    assert (extractor.dim, extractor.num_classes) == (32 if name == "deformable_detr" else 16, 5)


def test_regions_are_selected_by_score(folder_of: Callable[[str], Path]) -> None:
    folder, image = folder_of("detr"), image_of_seed(1, 90, 60)
    few, many = extractor_of(folder, min_regions=3, confidence=1.1), extractor_of(folder, max_regions=7, confidence=0.0)
    (regions, nothing), (more, _) = few.extract([image, None]), many.extract([image, None])
    assert nothing is None
    assert regions is not None and more is not None
    assert (len(regions.features), len(more.features)) == (3, 7)
    assert (np.diff(more.scores) <= 0).all() and np.array_equal(more.features[:3], regions.features)
    assert set(more.labels) <= set(range(5)) and more.boxes.shape == (7, 7)
    choice = choose("image", "hf_detector", {"weights": folder, "backbone": "detr"})
    identity = choice.complete_fingerprint(choice.build("cpu"))
    again = choose("image", "hf_detector", {**HFDetectorExtractor.options_from(identity), "weights": folder})
    assert again.complete_fingerprint(again.build("cpu")) == identity == json.loads(json.dumps(identity))


def test_folders_that_do_not_fit_are_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    detr = folder_of("detr")
    for options, message in (
        ({}, "--images hf_detector: it needs a model"),
        ({"weights": tmp_path / "none"}, "none: no such folder"),
        ({"weights": detr, "backbone": "rt_detr"}, "its architecture is detr, not rt_detr: --image-backbone detr"),
    ):
        with pytest.raises(UserError, match=message):
            choose("image", "hf_detector", options).build("cpu")
    folder = shutil.copytree(detr, tmp_path / "m")
    weights, fields = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    lacking = next(key for key in sorted(weights) if "decoder" in key and "norm" in key)
    for changed, change, message in (
        ({key: value for key, value in weights.items() if key != lacking}, {}, "its weights lack .*norm"),
        ({**weights, "other.weight": torch.zeros(1)}, {}, "which has no other.weight"),
        (weights, {"num_queries": 13}, r"is \[12, 16\], not \[13, 16\]"),
        (weights, {"model_type": "bert"}, "not a detector that hf_detector reads: model_type in its config.json is 'bert'"),
        (weights, {}, "no preprocessor_config.json there"),
    ):
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**fields, **change}))
        if "preprocessor" in message:
            (folder / "preprocessor_config.json").unlink()
        with pytest.raises(UserError, match=message) as error:
            extractor_of(folder)
        assert "\n" not in str(error.value)
