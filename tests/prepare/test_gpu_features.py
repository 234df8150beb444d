"""Features on a GPU: in fp16 near those of the CPU, and several workers on several devices."""

from pathlib import Path

import numpy as np
import pytest
import torch

from opt_ds.prepare.detector import FasterRCNNExtractor
from opt_ds.prepare.regions import GridExtractor
from tests.prepare.test_regions import noise, random_detector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: this machine has none"),
]


def test_grid_on_a_gpu_is_near_the_cpus() -> None:
    pictures = [noise(0), noise(1, 60, 90)]
    for ours, theirs in zip(GridExtractor(device="cuda").extract(pictures), GridExtractor().extract(pictures), strict=True):
        assert np.abs(ours.features.astype(float) - theirs.features).max() < 0.05 * np.abs(theirs.features).max()


def test_faster_rcnn_on_a_gpu_batches_by_size(tmp_path: Path) -> None:
    random_detector(tmp_path / "d.pt")
    sides = {"min_side": 96, "max_side": 128}
    extractor = FasterRCNNExtractor(tmp_path / "d.pt", device="cuda", **sides)
    pictures = [noise(0), noise(1, 60, 90), None, noise(2)]
    together = extractor.extract(pictures)
    assert extractor.identity()["precision"] == "fp16"
    assert together[2] is None
    for picture, regions in zip(pictures, together, strict=True):
        if picture is not None and regions is not None:
            alone = extractor.extract([picture])[0]
            assert alone is not None
            assert len(regions.features) == len(alone.features) == 10
            assert np.abs(regions.scores.astype(float) - alone.scores).max() < 0.02
