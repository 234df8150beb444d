"""Features on a GPU: in fp16 near those of the CPU, and several workers on several devices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import get_model

from opt_ds.features.detector import FasterRCNNExtractor, FasterRCNNOptions
from opt_ds.features.grid import GridExtractor, GridOptions
from tests.features.test_regions import noise, random_detector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: this machine has none"),
]


def test_grid_on_a_gpu_is_near_the_cpus() -> None:
    images = [noise(0), noise(1, 60, 90)]
    for ours, theirs in zip(GridExtractor(device="cuda").extract(images), GridExtractor().extract(images), strict=True):
        assert np.abs(ours.features.astype(float) - theirs.features).max() < 0.05 * np.abs(theirs.features).max()


def test_grid_of_another_backbone_on_a_gpu_is_near_the_cpus(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(get_model("resnet18", weights=None, num_classes=7).state_dict(), tmp_path / "w.pt")
    ours, theirs = (
        GridExtractor(GridOptions(weights=tmp_path / "w.pt", backbone="resnet18"), device).extract([noise(0)])[0]
        for device in ("cuda", "cpu")
    )
    assert np.abs(ours.features.astype(float) - theirs.features).max() < 0.05 * np.abs(theirs.features).max()
    assert np.abs(ours.scores.astype(float) - theirs.scores).max() < 0.02


def test_faster_rcnn_on_a_gpu_batches_by_size(tmp_path: Path) -> None:
    random_detector(tmp_path / "d.pt")
    sides = {"min_side": 96, "max_side": 128}
    extractor = FasterRCNNExtractor(FasterRCNNOptions(weights=tmp_path / "d.pt", **sides), "cuda")
    images = [noise(0), noise(1, 60, 90), None, noise(2)]
    together = extractor.extract(images)
    assert extractor.fingerprint()["precision"] == "fp16"
    assert together[2] is None
    for image, regions in zip(images, together, strict=True):
        if image is not None and regions is not None:
            alone = extractor.extract([image])[0]
            assert alone is not None
            assert len(regions.features) == len(alone.features) == 10
            assert np.abs(regions.scores.astype(float) - alone.scores).max() < 0.02
