"""Test the quality of a dVAE beside its controls, and the shifts of images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from opt_ds.dvae.codes import CodeExtractor
from opt_ds.dvae.model import DVAE_PRESETS, DiscreteVAE, fold, psnr_db
from opt_ds.dvae.quality import (
    LABELS,
    beside,
    codes_kept,
    controlled_quality,
    jpeg,
    psnr_of,
    quality_lines,
    scan_bytes,
    shift,
)

RANDOM = np.random.default_rng(0)


def drawings(count: int) -> np.ndarray:
    """Return smooth images of a disc on a ground, uint8 [count, 3, 64, 64]."""
    rows, columns = np.mgrid[:64, :64]
    found = np.empty((count, 3, 64, 64), np.uint8)
    for image in found:
        centre, colours = RANDOM.integers(16, 48, 2), RANDOM.integers(0, 256, (2, 3))
        disc = np.hypot(rows - centre[0], columns - centre[1]) < 14
        image[:] = np.where(disc, colours[0][:, None, None], colours[1][:, None, None])
    return found


def dvae_of(pixels: np.ndarray | None, seed: int = 0) -> CodeExtractor:
    """Return a dVAE that knows the patches of these images, or none."""
    torch.manual_seed(seed)
    dvae = DiscreteVAE(DVAE_PRESETS["dvae-tiny"])
    if pixels is not None:
        patches = fold(torch.from_numpy(pixels)).flatten(2).transpose(1, 2).flatten(0, 1)
        dvae.start_from_patches(patches, torch.Generator().manual_seed(0))
    return CodeExtractor(dvae)


def test_the_bits_of_a_jpeg_are_those_of_its_pixels_alone() -> None:
    def saved(image: np.ndarray, quality: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(file, format="JPEG", quality=quality)
        return file.getvalue()

    grey, drawing = np.full((3, 64, 64), 128, np.uint8), drawings(1)[0]
    files = [saved(image, 50) for image in (grey, drawing)]
    assert len({len(file) - scan_bytes(file) for file in files}) == 1, "headers and tables are equal"
    assert scan_bytes(files[0]) < 80 < scan_bytes(files[1]) < scan_bytes(saved(drawing, 90)) < 4000


def test_a_jpeg_keeps_to_the_bits_and_improves_with_them() -> None:
    drawing = drawings(1)
    found = [float(psnr_of(jpeg(drawing[0], bits)[None], drawing)[0]) for bits in (0, 320, 640, 2560, 40_000)]
    assert found == sorted(found) and found[-1] > found[1] + 5
    assert len({tuple(jpeg(drawing[0], 0)[:, y, x]) for y in (0, 30) for x in (3, 63)}) == 1, "the mean colour"
    grey = np.full((1, 3, 64, 64), 77, np.uint8)
    assert np.abs(jpeg(grey[0], 640).astype(int) - 77).max() <= 1


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (0, -2), (-3, 3)])
def test_a_shift_moves_pixels_and_repeats_the_border(down: int, right: int) -> None:
    images = RANDOM.integers(0, 256, (2, 3, 64, 64)).astype(np.uint8)
    moved = shift(images, np.array([[down, right], [0, 0]]))
    for y, x in ((5, 5), (0, 0), (63, 63), (0, 63), (31, 0)):
        source = images[0, :, np.clip(y - down, 0, 63), np.clip(x - right, 0, 63)]
        np.testing.assert_array_equal(moved[0, :, y, x], source)
    np.testing.assert_array_equal(moved[1], images[1])
    assert moved.dtype == np.uint8 and moved.shape == images.shape


def test_an_advantage_is_paired_and_has_an_interval() -> None:
    own = np.array([20.0, 30.0, 25.0, 35.0])
    found = beside(own, {"a little": own - [1.0, 1.1, 0.9, 1.0], "noise": own + np.array([9, -9, 9, -9])})
    little, noise = found["controls"]["a little"], found["controls"]["noise"]
    assert found["value"] == 27.5 and little["advantage"] == pytest.approx(1.0) and little["advantage_interval"][0] > 0.9
    assert noise["advantage"] == 0 and noise["advantage_interval"][0] < 0 < noise["advantage_interval"][1]
    assert beside(own[:1], {"one": own[1:2]})["controls"]["one"]["advantage_interval"] is None


def test_a_dvae_that_knows_the_patches_beats_what_does_not_and_not_itself() -> None:
    pixels = drawings(12)
    trained, mean = dvae_of(pixels), pixels.mean(0)
    found = controlled_quality(trained, dvae_of(None, seed=1), mean, pixels)
    controls = found["psnr_db"]["controls"]
    assert set(controls) == {"untrained", "jpeg", "mean_image", "another_image"} == set(LABELS)
    for name in ("untrained", "mean_image", "another_image"):
        assert controls[name]["advantage_interval"][0] > 0, name
    true = pixels / 255.0
    own = [psnr_db(float(np.square(a - b).mean())) for a, b in zip(trained.reconstruct(pixels), true, strict=True)]
    assert found["psnr_db"]["value"] == pytest.approx(np.mean(own), abs=1e-4)
    same = controlled_quality(trained, dvae_of(pixels), mean, pixels)["psnr_db"]["controls"]["untrained"]
    assert same["advantage"] == 0 == same["advantage_interval"][0]
    lines = quality_lines({"valid": found})
    assert len(lines) == 2 and all(label in lines[0] for label in LABELS.values())
    assert lines[0].startswith("dVAE: valid, mean PSNR per image (12 images): ")
    alone = controlled_quality(trained, dvae_of(None), mean, pixels[:1])
    assert "another_image" not in alone["psnr_db"]["controls"] and quality_lines({"valid": alone})


def test_codes_of_plain_images_are_kept_by_a_shift_and_those_of_noise_are_not() -> None:
    extractor = dvae_of(drawings(12))
    plain = np.broadcast_to(RANDOM.integers(0, 256, (4, 3, 1, 1)), (4, 3, 64, 64)).astype(np.uint8)
    assert codes_kept(extractor, plain).tolist() == [1.0] * 4
    noise = RANDOM.integers(0, 256, (4, 3, 64, 64)).astype(np.uint8)
    assert codes_kept(dvae_of(noise), noise).max() < 0.6
