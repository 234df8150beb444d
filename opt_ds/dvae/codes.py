"""Encode images to codes with a trained dVAE: the extractor, the codes of a store, and quality measures."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opt_ds.dvae.model import NUM_POSITIONS, DiscreteVAE, psnr_db
from opt_ds.errors import UserError
from opt_ds.store.files import exclusive_use
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import DVAE_FOLDER
from opt_ds.store.update import set_codes
from opt_ds.store.verify import open_store

_LOG = logging.getLogger(__name__)
BATCH = 256
#: An image that is reproduced exactly has no finite PSNR. Half a grey level is the resolution of uint8.
LEAST_ERROR = (0.5 / 255) ** 2


class CodeExtractor:
    """Feature extractor around a trained dVAE: images uint8 [3, 64, 64] -> codes uint16 [64], computed in fp32."""

    name = "dvae"

    def __init__(self, dvae: DiscreteVAE, device: str = "cpu") -> None:
        self.dvae = dvae.to(device).eval()
        self.device = device
        self.dim = dvae.config.codebook_size

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "CodeExtractor":
        """Load the output of `opt-ds train-dvae`. Raise UserError if it is missing or damaged."""
        return cls(DiscreteVAE.from_pretrained(folder), device)

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint: name, codebook size and SHA-256 of the weights."""
        return self.dvae.fingerprint()

    def extract(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the argmax codes of each image, uint16 [64], in row-major order of the 8×8 grid."""
        return list(self.encode(np.stack(inputs)).astype("uint16")) if len(inputs) else []

    def encode(self, pixels_nchw: np.ndarray) -> np.ndarray:
        """Return the argmax codes, int64 [n, 64], of images uint8 [n, 3, 64, 64]."""
        return self.dvae.encode(torch.from_numpy(pixels_nchw).to(self.device)).cpu().numpy()

    def reconstruct(self, pixels_nchw: np.ndarray) -> np.ndarray:
        """Encode images and decode their codes; return float32 [n, 3, 64, 64] in 0..1."""
        codes_ns = self.dvae.encode(torch.from_numpy(pixels_nchw).to(self.device))
        return self.dvae.decode(codes_ns).cpu().numpy()


@dataclass(frozen=True)
class ReconstructionQuality:
    """Reconstruction quality over some images.

    `psnr_db` is 10 log10(1 / mse), with the mse over all images and values. `mean_psnr_db` is the mean PSNR per image.
    """

    num_images: int
    psnr_db: float
    mean_psnr_db: float


def reconstruction_quality(extractor: CodeExtractor, store: FeatureStore, rows: np.ndarray) -> ReconstructionQuality:
    """Measure how well argmax codes reproduce the images of some image rows; pixels in 0..1.

    Requires at least one row.
    """
    errors = []
    for pixels_nchw in _batches(store, rows):
        difference = extractor.reconstruct(pixels_nchw).astype("float64") - pixels_nchw / 255.0
        errors.append(np.square(difference).mean((1, 2, 3)))
    errors_n = np.concatenate(errors)
    own = float(np.mean([psnr_db(max(error, LEAST_ERROR)) for error in errors_n]))
    return ReconstructionQuality(len(rows), psnr_db(float(errors_n.mean())), own)


def encode_store(extractor: CodeExtractor, store: FeatureStore, rows: np.ndarray | None = None) -> np.ndarray:
    """Return the codes of all images of the store, uint16 [num_images, 64], by image row.

    With `rows`, return the codes of these image rows.
    """
    rows = np.arange(num_images(store)) if rows is None else rows
    parts = [extractor.encode(pixels_nchw).astype("uint16") for pixels_nchw in _batches(store, rows)]
    return np.concatenate(parts) if parts else np.zeros((0, NUM_POSITIONS), "uint16")


def codebook_use(codes_ns: np.ndarray, codebook_size: int) -> dict[str, float]:
    """Return the number of codes that occur, their fraction of the codebook, and exp(entropy) of their distribution."""
    counts_k = np.bincount(codes_ns.reshape(-1), minlength=codebook_size)
    fraction_k = counts_k[counts_k > 0] / counts_k.sum()
    return {
        "codes_used": int((counts_k > 0).sum()),
        "fraction_used": float((counts_k > 0).mean()),
        "perplexity": float(np.exp(-(fraction_k * np.log(fraction_k)).sum())),
    }


def reconstruction_grid(
    extractor: CodeExtractor, pixels_nchw: np.ndarray, per_row: int = 8, zoom: int = 2
) -> np.ndarray:
    """Return a grid of images with each row of originals above the row of their reconstructions.

    Args:
        extractor: The trained dVAE.
        pixels_nchw: Original images, uint8 [n, 3, 64, 64].
        per_row: Number of images per row.
        zoom: Integer factor by which the grid is enlarged.

    Returns:
        The grid, uint8 [H, W, 3].
    """
    reconstructed_nchw = (extractor.reconstruct(pixels_nchw) * 255).round().astype("uint8")
    bands = []
    for start in range(0, len(pixels_nchw), per_row):
        for images_nchw in (pixels_nchw, reconstructed_nchw):
            row = np.full((per_row, *pixels_nchw.shape[1:]), 255, "uint8")
            part = images_nchw[start : start + per_row]
            row[: len(part)] = part
            bands.append(row.transpose(2, 0, 3, 1).reshape(row.shape[2], -1, 3))
    return np.concatenate(bands).repeat(zoom, 0).repeat(zoom, 1)


def write_missing_codes(store_path: Path, extractor: CodeExtractor) -> bool:
    """Write the codes of all images, and the dVAE, into the store unless they are already there.

    Return whether it wrote. Afterwards the store can decode its own codes: see `load_store_dvae`. If the process is
    killed between writing the codes and the dVAE, the store has the new codes and the previous dVAE. `load_store_dvae`
    refuses that combination, and calling this function again fixes it.
    """
    with exclusive_use(store_path):
        store = open_store(store_path, with_dvae=False)
        folder = store_path / DVAE_FOLDER
        for leftover in store_path.glob(f".{DVAE_FOLDER}.*.tmp"):
            shutil.rmtree(leftover)
        own = extractor.fingerprint()
        if store.has_codes and store.description.extractors.get("codes") == own == _fingerprint_in(folder):
            _LOG.info(f"dVAE: {store_path} already has this dVAE's codes")
            return False
        temporary = folder.with_name(f".{DVAE_FOLDER}.{os.getpid()}.tmp")
        try:
            extractor.dvae.save_pretrained(temporary)
            set_codes(store_path, encode_store(extractor, store), extractor.fingerprint())
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _LOG.info(f"dVAE: wrote the codes of {num_images(store)} images into {store_path}")
        return True


def _fingerprint_in(folder: Path) -> dict[str, Any] | None:
    try:
        return DiscreteVAE.from_pretrained(folder).fingerprint()
    except UserError:  # missing or incomplete: it will be written again
        return None


def num_images(store: FeatureStore) -> int:
    """Return the number of image rows of a store."""
    return sum(shard.num_images for shard in store.description.shards)


def split_image_rows(store: FeatureStore, split: str) -> np.ndarray:
    """Return the distinct image rows of a split's samples, ascending, int64.

    Raise UserError if there is no such split.
    """
    rows = np.unique(store.rows[store.split_samples(split), 1])
    return rows[rows >= 0]


def read_pixels(store: FeatureStore, rows: np.ndarray) -> np.ndarray:
    """Return the images of some image rows, uint8 [n, 3, 64, 64]."""
    return np.stack([store.pixels(int(row)) for row in rows])


def _batches(store: FeatureStore, rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), BATCH):
        yield read_pixels(store, rows[start : start + BATCH])
