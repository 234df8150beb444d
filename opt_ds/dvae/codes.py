"""Pictures to image codes with a trained dVAE: the extractor, a whole store's codes, and how good they are."""

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


class CodeExtractor:
    """The extractor interface around a trained dVAE: pictures uint8 [3, 64, 64] -> codes uint16 [64], in fp32."""

    name = "dvae"

    def __init__(self, dvae: DiscreteVAE, device: str = "cpu") -> None:
        self.dvae = dvae.to(device).eval()
        self.device = device
        self.dim = dvae.config.codebook_size

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "CodeExtractor":
        """Load what `opt-ds train-dvae` wrote. UserError if it is missing or damaged."""
        return cls(DiscreteVAE.from_pretrained(folder), device)

    def identity(self) -> dict[str, Any]:
        """Name, codebook size and SHA-256 of the weights."""
        return self.dvae.identity()

    def extract(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the argmax codes of each picture, uint16 [64], row by row of the 8×8 grid."""
        return list(self.encode(np.stack(inputs)).astype("uint16")) if len(inputs) else []

    def encode(self, pixels_nchw: np.ndarray) -> np.ndarray:
        """Return int64 codes [n, 64] of uint8 pictures [n, 3, 64, 64]."""
        return self.dvae.encode(torch.from_numpy(pixels_nchw).to(self.device)).cpu().numpy()

    def reconstruct(self, pixels_nchw: np.ndarray) -> np.ndarray:
        """Return what the decoder paints from the pictures' codes: float32 [n, 3, 64, 64] in 0..1."""
        codes_ns = self.dvae.encode(torch.from_numpy(pixels_nchw).to(self.device))
        return self.dvae.decode(codes_ns).cpu().numpy()


@dataclass(frozen=True)
class ReconstructionQuality:
    """`psnr_db`: 10 log10(1 / mse), mse over all pictures and values; `mean_psnr_db`: the mean of the pictures' own."""

    num_pictures: int
    psnr_db: float
    mean_psnr_db: float


def reconstruction_quality(extractor: CodeExtractor, store: FeatureStore, rows: np.ndarray) -> ReconstructionQuality:
    """Measure how well argmax codes reproduce the pictures of some image rows; pixels in 0..1. Needs a row."""
    errors = []
    for pixels_nchw in _batches(store, rows):
        difference = extractor.reconstruct(pixels_nchw).astype("float64") - pixels_nchw / 255.0
        errors.append(np.square(difference).mean((1, 2, 3)))
    errors_n = np.concatenate(errors)
    # A picture reproduced exactly has no finite PSNR; half a grey level is what uint8 can tell apart.
    floor = (0.5 / 255) ** 2
    own = float(np.mean([psnr_db(max(error, floor)) for error in errors_n]))
    return ReconstructionQuality(len(rows), psnr_db(float(errors_n.mean())), own)


def encode_store(extractor: CodeExtractor, store: FeatureStore, rows: np.ndarray | None = None) -> np.ndarray:
    """Return the codes of the store's pictures (or of some image rows): uint16 [num_images, 64], by image row."""
    rows = np.arange(num_images(store)) if rows is None else rows
    parts = [extractor.encode(pixels_nchw).astype("uint16") for pixels_nchw in _batches(store, rows)]
    return np.concatenate(parts) if parts else np.zeros((0, NUM_POSITIONS), "uint16")


def codebook_use(codes_ns: np.ndarray, codebook_size: int) -> dict[str, float]:
    """Return how many codes occur, their share of the codebook, and exp(entropy) of the codes' distribution."""
    counts_k = np.bincount(codes_ns.reshape(-1), minlength=codebook_size)
    share_k = counts_k[counts_k > 0] / counts_k.sum()
    return {
        "codes_used": int((counts_k > 0).sum()),
        "fraction_used": float((counts_k > 0).mean()),
        "perplexity": float(np.exp(-(share_k * np.log(share_k)).sum())),
    }


def reconstruction_grid(
    extractor: CodeExtractor, pixels_nchw: np.ndarray, per_row: int = 8, zoom: int = 2
) -> np.ndarray:
    """Return a picture uint8 [H, W, 3]: rows of true pictures, each above the row of their reconstructions."""
    painted_nchw = (extractor.reconstruct(pixels_nchw) * 255).round().astype("uint8")
    bands = []
    for start in range(0, len(pixels_nchw), per_row):
        for pictures_nchw in (pixels_nchw, painted_nchw):
            row = np.full((per_row, *pixels_nchw.shape[1:]), 255, "uint8")
            part = pictures_nchw[start : start + per_row]
            row[: len(part)] = part
            bands.append(row.transpose(2, 0, 3, 1).reshape(row.shape[2], -1, 3))
    return np.concatenate(bands).repeat(zoom, 0).repeat(zoom, 1)


def write_missing_codes(store_path: Path, extractor: CodeExtractor) -> bool:
    """Write the pictures' codes, and the dVAE itself, into the store unless they are there; returns whether it wrote.

    The store then paints its own codes: `load_store_dvae`. A kill between the codes and their dVAE leaves the former
    dVAE beside them, which `load_store_dvae` refuses; the same call mends that.
    """
    with exclusive_use(store_path):
        store = open_store(store_path, with_dvae=False)
        folder = store_path / DVAE_FOLDER
        for leftover in store_path.glob(f".{DVAE_FOLDER}.*.tmp"):
            shutil.rmtree(leftover)
        if store.has_codes and store.description.extractors.get("codes") == extractor.identity() == _identity_in(folder):
            _LOG.info(f"dVAE: {store_path} already has this dVAE's codes")
            return False
        temporary = folder.with_name(f".{DVAE_FOLDER}.{os.getpid()}.tmp")
        try:
            extractor.dvae.save_pretrained(temporary)
            set_codes(store_path, encode_store(extractor, store), extractor.identity())
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _LOG.info(f"dVAE: wrote the codes of {num_images(store)} pictures into {store_path}")
        return True


def _identity_in(folder: Path) -> dict[str, Any] | None:
    try:
        return DiscreteVAE.from_pretrained(folder).identity()
    except UserError:  # missing, or cut off while it was written: written again
        return None


def num_images(store: FeatureStore) -> int:
    """Return the number of image rows of a store."""
    return sum(shard.num_images for shard in store.description.shards)


def split_image_rows(store: FeatureStore, split: str) -> np.ndarray:
    """Return the distinct image rows of a split's samples, ascending int64. UserError for a split that is not there."""
    rows = np.unique(store.rows[store.split_samples(split), 1])
    return rows[rows >= 0]


def read_pixels(store: FeatureStore, rows: np.ndarray) -> np.ndarray:
    """Return the pictures of some image rows, uint8 [n, 3, 64, 64]."""
    return np.stack([store.pixels(int(row)) for row in rows])


def _batches(store: FeatureStore, rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), BATCH):
        yield read_pixels(store, rows[start : start + BATCH])
