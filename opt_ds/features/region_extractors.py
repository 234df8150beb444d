"""Build region feature extractors by name: `grid`, `faster_rcnn` (detector.py), `npz` (npz_regions.py)."""

from pathlib import Path

from opt_ds.errors import UserError, did_you_mean
from opt_ds.features.grid import GridExtractor, Normalisation
from opt_ds.features.npz_regions import NpzExtractor
from opt_ds.features.regions import RegionExtractor

REGION_EXTRACTORS = ("grid", "faster_rcnn", "npz")


def build_region_extractor(
    name: str,
    *,
    weights: Path | None = None,
    backbone: str | None = None,
    min_side: int = 600,
    max_side: int = 1000,
    device: str = "cpu",
    normalisation: Normalisation | None = None,
) -> RegionExtractor:
    """Build an extractor by name.

    Args:
        name: One of REGION_EXTRACTORS.
        weights: State dict file; not for npz.
        backbone: Name of the backbone; grid only.
        min_side: Shorter side of the resized image in pixels; faster_rcnn only.
        max_side: Upper bound of the longer side in pixels; faster_rcnn only.
        device: Device that the network runs on.
        normalisation: Normalisation of colours; grid only. None: that of the backbone's weights.

    Raises:
        UserError: The name is unknown, or the weights are missing or do not fit.
    """
    if name == "grid":
        return GridExtractor(weights=weights, backbone=backbone, device=device, normalisation=normalisation)
    if name == "faster_rcnn":
        from opt_ds.features.detector import FasterRCNNExtractor

        return FasterRCNNExtractor(weights, min_side=min_side, max_side=max_side, device=device)
    if name == "npz":
        if weights is not None:
            raise UserError("--image-weights: npz files have their features already: leave it out")
        return NpzExtractor()
    raise UserError(
        f'--images "{name}": unknown extractor{did_you_mean(name, REGION_EXTRACTORS)}: '
        f"choose {', '.join(REGION_EXTRACTORS)}"
    )
