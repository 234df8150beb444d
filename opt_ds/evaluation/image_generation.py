"""Image generation: bits per image code of the true codes, and metrics of images generated from sampled codes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.retrieval import chance, content_names, recall
from opt_ds.evaluation.runner import ModelRunner
from opt_ds.model.generation import DecodingConfig
from opt_ds.tasks.reconstruct import code_targets, set_code_targets

if TYPE_CHECKING:
    from opt_ds.dvae.model import DiscreteVAE

#: Default sampling options.
DEFAULT_SAMPLING = DecodingConfig(method="sample", top_k=32, temperature=0.8)


@torch.inference_mode()
def bits_per_code(evaluator: Evaluator, split: str, inputs: str = "T", limit: int | None = None, seed: int = 1) -> dict[str, Any]:
    """Return the mean −log2 P(code | previous codes, input) over all true codes of the split.

    The baseline `unigram_bits_per_code` uses the codes' training frequencies.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        inputs: Input modalities, a key of SUBSETS.
        limit: Maximum number of samples. None: all.
        seed: Seed of the choice of samples.

    Returns:
        The figures, as plain values.
    """
    modalities = SUBSETS[inputs]
    gallery = evaluator.require_samples(split, (IMAGE, *modalities), limit, seed)
    samples = [evaluator.read(index, modalities) for index in gallery]
    codes = [evaluator.store.codes(int(evaluator.store.rows[index, IMAGE])).astype(np.int64) for index in gallery]
    for sample, target in zip(samples, codes, strict=True):
        set_code_targets(sample, target)
    total, count = 0.0, 0
    for _, batch, hidden_te in evaluator.batches(samples):
        scores = evaluator.model.image_decoder.scores(code_targets(batch), hidden_te).float()
        targets = code_targets(batch).target_ids
        total += float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))
        count += len(targets)
    total, count = evaluator.over_ranks(total), round(evaluator.over_ranks(count))
    unigram = _unigram_bits(evaluator, codes)
    return {"split": split, "inputs": inputs, "bits_per_code": total / count / np.log(2), "unigram_bits_per_code": unigram,
            "samples": len(gallery)}  # fmt: skip


def possible_inputs(evaluator: Evaluator, split: str) -> tuple[str, ...]:
    """Return those of "T", "A" and "T+A" that samples of the split have together with an image.

    Raise UserError if there are none.
    """
    found = tuple(name for name in ("T", "A", "T+A") if evaluator.has_samples(split, (IMAGE, *SUBSETS[name])))
    if not found:
        raise UserError(f'{evaluator.store.path}: no sample of split "{split}" has an image and text or audio: choose another')
    return found


@dataclass(frozen=True)
class ImageGenerator:
    """Image generator: sampling options, and the number of candidates of which the best is kept.

    `match_probability` returns the match probability of an input and an image. It is required if there are several candidates.
    """

    dvae: "DiscreteVAE"
    options: DecodingConfig = DEFAULT_SAMPLING
    candidates: int = 1
    match_probability: Callable[[Sample, Image.Image], float] | None = None

    def generate(self, runner: ModelRunner, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray | None]:
        """Generate one image per sample.

        Returns:
            The best candidate of each sample, uint8 [samples, 3, 64, 64]; and the match probabilities [samples,
            candidates] in the order of generation, or None with a single candidate.
        """
        generated = generate_candidates(runner, self.dvae, samples, self.options, self.candidates)
        if self.candidates == 1:
            return generated[:, 0], None
        assert self.match_probability is not None, "several candidates are compared"
        scores = np.array(
            [
                [self.match_probability(sample, to_image(one)) for one in own]
                for sample, own in zip(samples, generated, strict=True)
            ]
        )
        return generated[np.arange(len(samples)), scores.argmax(1)], scores


def generate_candidates(
    runner: ModelRunner, dvae: "DiscreteVAE", samples: Sequence[Sample], options: DecodingConfig, count: int
) -> np.ndarray:
    """Return images uint8 [samples, count, 3, 64, 64], decoded by the dVAE from independently sampled image codes.

    Args:
        runner: The model.
        dvae: Decoder of the codes.
        samples: The inputs.
        options: Sampling options.
        count: Candidates per sample.

    Returns:
        The candidates of each sample.
    """
    # Repeated samples get different keys and so independent codes.
    codes = torch.from_numpy(runner.write_codes(list(samples) * count, options)).to(runner.device)
    with torch.inference_mode():
        generated = np.concatenate([to_uint8(dvae.decode(part)) for part in codes.split(256)])
    return generated.reshape(count, len(samples), *generated.shape[1:]).swapaxes(0, 1)


def generation_figures(
    evaluator: Evaluator,
    split: str,
    inputs: str,
    generator: ImageGenerator,
    limit: int | None = None,
    seed: int = 1,
    image_embedding: Callable[[Image.Image], np.ndarray] | None = None,
    inception: Path | None = None,
    clip: Path | None = None,
) -> dict[str, Any]:
    """Return metrics of images generated from each sample's `inputs`, compared with the true images.

    - `nearest`, with `image_embedding`: fraction of generated images whose own true image is among the 1, 5, 10 nearest true
      images, by cosine of centred embeddings.
    - `fid`, with `inception`: Fréchet inception distance to the true images.
    - `clip_score`, with `clip`: of the generated images, of the true images, and of generated images with another
      caption.
    - `matching`, with several candidates: mean match probability of the first candidate and of the kept one.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        inputs: Input modalities, a key of SUBSETS.
        generator: The image generator.
        limit: Maximum number of samples. None: all.
        seed: Seed of the choice of samples.
        image_embedding: Returns the embedding of an image.
        inception: Weights of Inception-v3.
        clip: Folder of a CLIP model.

    Returns:
        The figures, as plain values.
    """
    from opt_ds.evaluation import image_networks

    modalities = SUBSETS[inputs]
    needed = {IMAGE, *modalities} | ({TEXT} if clip is not None else set())
    gallery = evaluator.require_samples(split, sorted(needed), limit, seed)
    samples = [evaluator.read(index, modalities) for index in gallery]
    generated, scores = generator.generate(evaluator, samples)
    true = np.stack([evaluator.store.pixels(int(row)) for row in evaluator.store.rows[gallery, IMAGE]])
    figures: dict[str, Any] = {
        "split": split, "inputs": inputs, "samples": len(gallery), "candidates": generator.candidates,
        "sampling": generator.options.model_dump(),
    }  # fmt: skip
    if scores is not None:
        figures["matching"] = {"first": float(scores[:, 0].mean()), "kept": float(scores.max(1).mean())}
    if image_embedding is not None:
        names = content_names(evaluator, gallery, IMAGE)
        same = names[:, None] == names[None, :]
        figures["nearest"] = {**recall(_cosines(generated, true, image_embedding), same), "chance": chance(same)}
    if inception is not None:
        figures["fid"] = image_networks.frechet_inception_distance(generated, true, inception)
    if clip is not None:
        captions = [evaluator.caption(index) for index in gallery]
        others = [captions[-1], *captions[:-1]]
        clip_score = image_networks.ClipScore(clip, evaluator.device)
        figures["clip_score"] = {
            "generated": clip_score.mean(generated, captions), "true": clip_score.mean(true, captions),
            "another_caption": clip_score.mean(generated, others) if len(captions) > 1 else None,
        }  # fmt: skip
    return figures


def _cosines(
    generated: np.ndarray, true: np.ndarray, image_embedding: Callable[[Image.Image], np.ndarray]
) -> np.ndarray:
    """Return cosines [generated, true] of the images' embeddings, centred on the mean of the true ones."""
    seen_pe, seen_te = (
        np.stack([image_embedding(to_image(one)) for one in some]).astype(np.float64) for some in (generated, true)
    )
    mean_e = seen_te.mean(0)
    seen_pe, seen_te = seen_pe - mean_e, seen_te - mean_e
    lengths = np.linalg.norm(seen_pe, axis=1)[:, None] * np.linalg.norm(seen_te, axis=1)[None, :]
    return seen_pe @ seen_te.T / np.maximum(lengths, 1e-12)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Return uint8 [3, H, W] as a PIL image."""
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


@torch.inference_mode()
def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Return images with values in 0…1 as uint8."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _unigram_bits(evaluator: Evaluator, codes: list[np.ndarray]) -> float:
    store = evaluator.store
    train = store.rows[store.split_samples(evaluator.config.data.train_split), IMAGE]
    counts = np.full(evaluator.config.model.image_codebook_size, 0.5)
    for row in np.unique(train[train >= 0]):
        np.add.at(counts, store.codes(int(row)), 1)
    bits = -np.log2(counts / counts.sum())
    return float(np.mean(bits[np.stack(codes)]))


def table(figures: dict[str, Any]) -> str:
    """Return the figures of `opt-ds evaluate image-generation` as text, one line per input."""
    lines = []
    for name in (name for name in SUBSETS if name in figures):
        row = figures[name]
        unigram = row["unigram_bits_per_code"]
        line = f"{name:>4} → image   {row['bits_per_code']:.2f} bits per code (by training frequencies {unigram:.2f})"
        generated = row.get("generated", {})
        if nearest := generated.get("nearest"):
            chance_of_it = nearest["chance"]["R@1"]
            line += (
                f"   true image the nearest {nearest['R@1']:.1%} of {generated['samples']} (chance {chance_of_it:.1%})"
            )
        if matching := generated.get("matching"):
            best = f"best of {generated['candidates']} {matching['kept']:.3f}"
            line += f"   match probability {matching['first']:.3f}, {best}"
        if "fid" in generated:
            line += f"   FID {generated['fid']:.1f}"
        if score := generated.get("clip_score"):
            line += f"   CLIP score {score['generated']:.1f} (true images {score['true']:.1f})"
        lines.append(line)
    return "\n".join(lines)
