"""Quality of a trained dVAE beside controls.

A PSNR says little alone. It stands beside that of the untrained dVAE (its codebook of k-means centroids), of a JPEG of as
many bits, of the mean training image, and of another image's codes. The advantage over a control has a 95 % interval.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from opt_ds.dvae.codes import LEAST_ERROR, CodeExtractor
from opt_ds.dvae.model import IMAGE_SIZE, NUM_POSITIONS, psnr_db

#: Control -> how it is called where it is printed.
LABELS = {
    "another_image": "another image's codes",
    "jpeg": "JPEG of as many bits",
    "mean_image": "mean training image",
    "untrained": "untrained (k-means)",
}
_SHIFTS = ((0, 1), (0, -1), (1, 0), (-1, 0))  # one pixel down, up, right and left
_JPEG_SIDES = (64, 32, 16, 8)
_QUALITIES = (1, 95)
_DEVIATIONS = 1.96  # of a normal distribution, for 95 %


def controlled_quality(
    trained: CodeExtractor, untrained: CodeExtractor, mean_chw: np.ndarray, pixels_nchw: np.ndarray
) -> dict[str, Any]:
    """Return the quality of a dVAE on some images, with its controls, as plain values.

    - `psnr_db`: mean PSNR per image.
    - `codes_kept`: fraction of codes that stay the same if the image is shifted by one pixel, whose border is repeated.

    Args:
        trained: The dVAE.
        untrained: The same before its first step.
        mean_chw: The mean training image, values in 0..255.
        pixels_nchw: Images that it was not trained on, uint8 [n, 3, 64, 64].
    """
    bits = NUM_POSITIONS * math.log2(trained.dim)
    found = trained.reconstruct(pixels_nchw)
    psnr = {
        "untrained": psnr_of(untrained.reconstruct(pixels_nchw) * 255, pixels_nchw),
        "jpeg": psnr_of(np.stack([jpeg(image_chw, bits) for image_chw in pixels_nchw]), pixels_nchw),
        "mean_image": psnr_of(mean_chw[None], pixels_nchw),
    }
    kept = {"untrained": codes_kept(untrained, pixels_nchw)}
    if len(pixels_nchw) > 1:
        others = np.roll(np.arange(len(pixels_nchw)), 1)
        codes_ns = trained.encode(pixels_nchw)
        psnr["another_image"] = psnr_of(found[others] * 255, pixels_nchw)
        kept["another_image"] = (codes_ns == codes_ns[others]).mean(1)
    return {
        "num_images": len(pixels_nchw),
        "psnr_db": beside(psnr_of(found * 255, pixels_nchw), psnr),
        "codes_kept": beside(codes_kept(trained, pixels_nchw), kept),
    }


def beside(own_n: np.ndarray, controls: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the mean of one value per image beside those of controls on the same images.

    The interval of an advantage is that of a mean of paired differences. One image alone has none.
    """
    found = {}
    for name, values_n in controls.items():
        difference_n = own_n - values_n
        half = _DEVIATIONS * difference_n.std(ddof=1) / math.sqrt(len(own_n)) if len(own_n) > 1 else None
        advantage = float(difference_n.mean())
        interval = None if half is None else [advantage - float(half), advantage + float(half)]
        found[name] = {"value": float(values_n.mean()), "advantage": advantage, "advantage_interval": interval}
    return {"value": float(own_n.mean()), "controls": found}


def psnr_of(found_nchw: np.ndarray, pixels_nchw: np.ndarray) -> np.ndarray:
    """Return the PSNR of each image in dB, float64 [n]. Both have values in 0..255."""
    errors_n = np.square((found_nchw - pixels_nchw.astype(np.float64)) / 255).mean((1, 2, 3))
    return np.array([psnr_db(max(float(error), LEAST_ERROR)) for error in errors_n])


def shift(pixels_nchw: np.ndarray, offsets_n2: np.ndarray) -> np.ndarray:
    """Return images shifted by (rows, columns) of pixels, int [n, 2]. The border is repeated where nothing is left."""
    most = int(np.abs(offsets_n2).max(initial=0))
    padded = np.pad(pixels_nchw, ((0, 0), (0, 0), (most, most), (most, most)), mode="edge")
    height, width = pixels_nchw.shape[2:]
    return np.stack([
        image[:, most - down : most - down + height, most - right : most - right + width]
        for image, (down, right) in zip(padded, offsets_n2.tolist(), strict=True)
    ])  # fmt: skip


def codes_kept(extractor: CodeExtractor, pixels_nchw: np.ndarray) -> np.ndarray:
    """Return the fraction of codes per image that a shift by one pixel does not change, float64 [n]."""
    codes_ns = extractor.encode(pixels_nchw)
    moved = [extractor.encode(shift(pixels_nchw, np.full((len(pixels_nchw), 2), offset))) for offset in _SHIFTS]
    return np.mean([codes_ns == other_ns for other_ns in moved], axis=(0, 2))


def jpeg(image_chw: np.ndarray, max_bits: float) -> np.ndarray:
    """Return the best reconstruction of an image, uint8 [3, 64, 64], from a JPEG of at most `max_bits`.

    Only the compressed pixels count, without headers and tables, as a dVAE's codebook does not count either. The image may
    be scaled down first. If nothing fits, its mean colour is returned.
    """
    image = Image.fromarray(np.ascontiguousarray(image_chw.transpose(1, 2, 0)))
    candidates = [found for side in _JPEG_SIDES if (found := _largest_jpeg(image, side, max_bits)) is not None]
    if not candidates:
        return np.broadcast_to(image_chw.mean((1, 2), keepdims=True), image_chw.shape).round().astype(np.uint8)
    errors = [np.square(found.astype(np.float64) - image_chw).mean() for found in candidates]
    return candidates[int(np.argmin(errors))]


def _largest_jpeg(image: Image.Image, side: int, max_bits: float) -> np.ndarray | None:
    """Return the image through a JPEG of this side, of the largest quality that fits, or None if none fits."""
    small = image.resize((side, side), Image.Resampling.BOX)
    best, (low, high) = None, _QUALITIES
    while low <= high:
        quality, file = (low + high) // 2, io.BytesIO()
        small.save(file, format="JPEG", quality=quality, subsampling="4:2:0")
        if 8 * scan_bytes(file.getvalue()) <= max_bits:
            best, low = file, quality + 1
        else:
            high = quality - 1
    if best is None:
        return None
    with Image.open(best) as decoded:
        return np.asarray(decoded.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def scan_bytes(data: bytes) -> int:
    """Return the number of bytes of a baseline JPEG's compressed pixels: between the header of its scan and the end mark."""
    place = 2  # after the start mark
    while data[place + 1] != 0xDA:  # start of scan
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return len(data) - 2 - (place + 2 + int.from_bytes(data[place + 2 : place + 4], "big"))


def quality_lines(controls: Mapping[str, Any]) -> list[str]:
    """Return lines of text: per split the PSNR and the codes kept, each beside its controls.

    `controls` has the result of `controlled_quality` by split.
    """
    lines = []
    for split, found in controls.items():
        for key, title, form in (
            ("psnr_db", "mean PSNR per image", _decibels), ("codes_kept", "codes kept by a shift of one pixel", _percent),
        ):  # fmt: skip
            figure = found[key]
            parts = [f"{LABELS[name]} {_control(control, form)}" for name, control in figure["controls"].items()]
            lines.append(f"dVAE: {split}, {title} ({found['num_images']} images): {form(figure['value'])}; {', '.join(parts)}")
    return lines


def _control(control: Mapping[str, Any], form: Any) -> str:
    bounds = control["advantage_interval"]
    as_good = bounds is not None and bounds[0] <= 0
    return form(control["value"]) + (" (the dVAE is not better)" if as_good else "")


def _decibels(value: float) -> str:
    return f"{value:.2f} dB"


def _percent(value: float) -> str:
    return f"{value:.0%}"
