"""Text→image: bits per image code of the true codes, and pictures painted from sampled codes."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opt_ds.data.planned import IMAGE
from opt_ds.evaluate.evaluator import SUBSETS, Evaluator
from opt_ds.model.generation import DecodingConfig

if TYPE_CHECKING:
    from opt_ds.model.dvae import DiscreteVAE

#: What pictures are sampled with where nothing else is asked for.
DEFAULT_SAMPLING = DecodingConfig(method="sample", top_k=32, temperature=0.8)


@torch.inference_mode()
def bits_per_code(evaluator: Evaluator, split: str, inputs: str = "T", limit: int | None = None, seed: int = 1) -> dict[str, Any]:
    """Mean −log2 P(code | codes before, input) over all true codes of the split, beside the codes' training frequencies."""
    modalities = SUBSETS[inputs]
    gallery = evaluator.samples_with(split, (IMAGE, *modalities), limit, seed)
    samples = [evaluator.read(index, modalities) for index in gallery]
    codes = [evaluator.store.codes(int(evaluator.store.rows[index, IMAGE])).astype(np.int64) for index in gallery]
    for sample, target in zip(samples, codes, strict=True):
        sample.written_codes = target
    total, count = 0.0, 0
    for _, batch, hidden_te in evaluator.batches(samples):
        scores = evaluator.model.image_decoder.scores(batch.written_image, hidden_te).float()
        targets = batch.written_image.target_ids
        total += float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))
        count += len(targets)
    total, count = evaluator.over_ranks(total), round(evaluator.over_ranks(count))
    unigram = _unigram_bits(evaluator, codes)
    return {"split": split, "inputs": inputs, "bits_per_code": total / count / np.log(2), "unigram_bits_per_code": unigram,
            "samples": len(gallery)}  # fmt: skip


def paint(
    evaluator: Evaluator, dvae: "DiscreteVAE", samples: list, options: DecodingConfig = DEFAULT_SAMPLING
) -> np.ndarray:
    """uint8 [samples, 3, 64, 64]: the dVAE's picture of the codes that the image decoder writes."""
    codes = torch.from_numpy(evaluator.write_codes(samples, options))
    return to_uint8(dvae.decode(codes))


@torch.inference_mode()
def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """Pictures in 0…1 as uint8."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _unigram_bits(evaluator: Evaluator, codes: list[np.ndarray]) -> float:
    store = evaluator.store
    train = store.rows[store.split_samples(evaluator.config.data.train_split), IMAGE]
    counts = np.full(evaluator.config.model.image_codebook_size, 0.5)
    for row in np.unique(train[train >= 0]):
        np.add.at(counts, store.codes(int(row)), 1)
    bits = -np.log2(counts / counts.sum())
    return float(np.mean(bits[np.stack(codes)]))
