"""Image generation: bits per image code of the true codes, and metrics of images generated from sampled codes.

Bits per code stand beside counts of the training codes (frequencies, by position, by position with the codes to the left
and above) and beside those with another sample's input. Generated images stand beside those of another sample's input.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.errors import UserError
from opt_ds.evaluation.controls import NO_OTHER, Others, another, content_names, other_samples, with_others
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.figures import (
    Control,
    Figure,
    Measured,
    beside,
    decimals,
    figure_lines,
    measure,
)
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.ranking import chance, recall_figures
from opt_ds.evaluation.reading import IMAGE_INPUTS, generated_metrics, read_bits
from opt_ds.evaluation.reranking import Reranker
from opt_ds.evaluation.runner import ModelRunner
from opt_ds.model.generation import DecodingConfig
from opt_ds.tasks.context_counts import code_contexts, code_positions
from opt_ds.tasks.reconstruct import set_code_targets

if TYPE_CHECKING:
    from opt_ds.dvae.model import DiscreteVAE

#: Default sampling options.
DEFAULT_SAMPLING = DecodingConfig(method="sample", top_k=32, temperature=0.8)


def bits_per_code(evaluator: Evaluator, split: str, inputs: str = "T", limit: int | None = None, seed: int = 1) -> dict[str, Any]:
    """Return the mean −log2 P(code | previous codes, input) over all true codes of the split, beside its controls.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        inputs: Input modalities, a key of SUBSETS.
        limit: Maximum number of samples. None: all.
        seed: Seed of the choice of samples and of the other samples.

    Returns:
        The figures, as plain values.
    """
    modalities = SUBSETS[inputs]
    gallery = evaluator.require_samples(split, (IMAGE, *modalities), limit, seed)
    codes_nk = np.stack([evaluator.store.codes(int(row)) for row in evaluator.store.rows[gallery, IMAGE]]).astype(np.int64)

    def bits(samples: list[Sample], codes: np.ndarray) -> Measurement:
        for sample, target in zip(samples, codes, strict=True):
            set_code_targets(sample, target)
        return Measurement.mean(evaluator.code_bits(samples).mean(1))

    controls = counted_bits(evaluator, codes_nk)
    others = other_samples(evaluator, gallery, (IMAGE, *modalities), seed)
    for modality in modalities if len(others.places) else ():
        swapped = with_others(evaluator, gallery, modalities, modality, others)
        controls[another(modality)] = Measured(bits(swapped, codes_nk[others.places]), others.places)
    own = bits([evaluator.read(index, modalities) for index in gallery], codes_nk)
    figure = measure(own, controls, lower_is_better=True)
    unigram = figure.controls["code_frequencies"].value
    return {"split": split, "inputs": inputs, **beside({"bits_per_code": figure}), "unigram_bits_per_code": unigram,
            "samples": len(gallery)}  # fmt: skip


def counted_bits(evaluator: Evaluator, codes_nk: np.ndarray) -> dict[str, Measured]:
    """Return the bits per code of models that count the training split's codes, as controls.

    `codes_nk` are the image codes to predict, int64 [n, codes per image].
    """
    counts, size = evaluator.training_statistics, evaluator.config.model.image_codebook_size
    found = {
        "code_frequencies": (counts.code_frequencies, [[]]),
        "code_positions": (counts.codes_by_position, code_positions(codes_nk)),
        "code_contexts": (counts.codes_in_context, code_contexts(codes_nk, size)),
    }
    return {
        name: Measured(Measurement.mean(model.bits(contexts, codes_nk.reshape(-1)).reshape(codes_nk.shape).mean(1)))
        for name, (model, contexts) in found.items()
    }


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
    """Image generator: sampling options, and the number of candidates of which the best by the reranker is kept.

    A single image is generated without a reranker, and from inputs that it does not accept.
    """

    dvae: "DiscreteVAE"
    options: DecodingConfig = DEFAULT_SAMPLING
    candidates: int = 1
    reranker: Reranker | None = None

    def generate(self, runner: ModelRunner, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray | None]:
        """Generate one image per sample.

        Returns:
            The best candidate of each sample, uint8 [samples, 3, 64, 64]; and the reranker's scores [samples, candidates] in
            the order of generation, or None if there was a single candidate.
        """
        reranker = self.reranker
        if self.candidates == 1 or reranker is None or not all(reranker.accepts(sample.items) for sample in samples):
            return generate_candidates(runner, self.dvae, samples, self.options, 1)[:, 0], None
        generated = generate_candidates(runner, self.dvae, samples, self.options, self.candidates)
        scores = np.array(
            [
                [reranker.score(sample, to_image(one)) for one in own]
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
    - `fid`, with `inception`: Fréchet inception distance to the true images. The control is that of training images,
      which a generator reaches that ignores its input.
    - `clip_score`, with `clip`: of the generated images, of the true images, and of images generated from another
      sample's input.
    - The name of the reranker, with several candidates: its mean score of the first candidate and of the kept one.

    The control of the others is another sample's input, for each of its modalities.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        inputs: Input modalities, a key of SUBSETS.
        generator: The image generator.
        limit: Maximum number of samples. None: all.
        seed: Seed of the choice of samples and of the other samples.
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
    others = other_samples(evaluator, gallery, (IMAGE, *modalities), seed)
    swapped = _from_others(evaluator, gallery, modalities, generator, generated, others)
    true = _pixels(evaluator, gallery)
    row: dict[str, Any] = {
        "split": split, "inputs": inputs, "samples": len(gallery), "candidates": 1 if scores is None else generator.candidates,
        "sampling": generator.options.model_dump(),
    }  # fmt: skip
    if scores is not None and generator.reranker is not None:
        row[generator.reranker.name] = _ranked(generator.reranker, samples, generated, scores, others)
    if image_embedding is not None:
        names = content_names(evaluator, gallery, IMAGE)
        same = names[:, None] == names[None, :]
        cosines = {
            name: _cosines(images, true, image_embedding) for name, images in {"own": generated, **swapped}.items()
        }
        row["nearest"] = {**beside(recall_figures(cosines.pop("own"), same, cosines, others.places)), "chance": chance(same)}
    if inception is not None:
        fid = image_networks.frechet_inception_distance(generated, true, inception)
        row |= beside({"fid": _distance(fid, evaluator, true, inception, seed)})
    if clip is not None:
        clip_score = image_networks.ClipScore(clip, evaluator.device)
        row["clip_score"] = _clip_scores(
            clip_score, [evaluator.caption(index) for index in gallery], generated, true, swapped, others
        )
    return row


def _from_others(
    evaluator: Evaluator, gallery: np.ndarray, modalities: tuple[int, ...], generator: ImageGenerator,
    generated: np.ndarray, others: Others,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return control -> images as generated with another sample's input. A sample without another one keeps its own.

    With a single modality these are the images of the other samples.
    """
    found = {}
    for modality in modalities if len(others.places) else ():
        images = generated.copy()
        if len(modalities) == 1:
            images[others.places] = generated[others.others]
        else:
            images[others.places] = generator.generate(
                evaluator, with_others(evaluator, gallery, modalities, modality, others)
            )[0]
        found[another(modality)] = images
    return found


def _ranked(
    reranker: Reranker, samples: Sequence[Sample], generated: np.ndarray, scores: np.ndarray, others: Others
) -> dict[str, Any]:
    """Return the mean score of the first candidate and of the kept one, beside the kept ones of others."""
    pairs = zip(others.places, others.others, strict=True)
    elsewhere = np.array(
        [reranker.score(samples[own], to_image(generated[other])) for own, other in pairs]
    )
    control = {"unmatched_image": Measured(Measurement.mean(elsewhere), others.places)}
    return beside({
        name: measure(Measurement.mean(values), control, uncontrolled=NO_OTHER)
        for name, values in (("first", scores[:, 0]), ("kept", scores.max(1)))
    })  # fmt: skip


def _distance(fid: float, evaluator: Evaluator, true: np.ndarray, inception: Path, seed: int) -> Figure:
    """Return the FID beside that of as many training images. It has no interval, since it is no sum over the images."""
    from opt_ds.evaluation import image_networks

    train = evaluator.samples_with(evaluator.config.data.train_split, (IMAGE,), len(true), seed)
    if len(train) < 2:
        return Figure(fid, None, {}, "there are no training images to compare with")
    other = image_networks.frechet_inception_distance(_pixels(evaluator, train), true, inception)
    return Figure(fid, None, {"training_images": Control(other, None, other - fid, None, len(train))})


def _clip_scores(
    clip_score: Any,
    captions: list[str],
    generated: np.ndarray,
    true: np.ndarray,
    swapped: Mapping[str, np.ndarray],
    others: Others,
) -> dict[str, Any]:
    """Return CLIP's scores of generated images with their captions, beside those generated from another sample's input."""
    elsewhere = {
        name: Measurement.mean(clip_score.scores(images, captions)).at(others.places)
        for name, images in swapped.items()
    }
    figure = measure(
        Measurement.mean(clip_score.scores(generated, captions)),
        {name: Measured(measurement, others.places) for name, measurement in elsewhere.items()}, uncontrolled=NO_OTHER,
    )  # fmt: skip
    return {**beside({"generated": figure}), "true": clip_score.mean(true, captions)}


def _pixels(evaluator: Evaluator, samples: np.ndarray) -> np.ndarray:
    """Return the true images of samples, uint8 [samples, 3, 64, 64]."""
    return np.stack([evaluator.store.pixels(int(row)) for row in evaluator.store.rows[samples, IMAGE]])


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


def image_generation_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures of `opt-ds evaluate image-generation` as text: per input and metric a line, controls below."""
    lines = []
    for name in (name for name in IMAGE_INPUTS if name in figures):
        lines += bits_lines(figures[name], IMAGE_INPUTS[name])
        generated = figures[name].get("generated", {})
        for metric, shown, form in generated_metrics(generated):
            lines += figure_lines(f"{IMAGE_INPUTS[name]}, {metric}", shown, form)
        if score := generated.get("clip_score"):
            lines.append(f"      CLIP score of the true images {score['true']:.1f}")
    return lines


def bits_lines(row: Mapping[str, Any], name: str) -> list[str]:
    """Return a row of `bits_per_code` as text."""
    return figure_lines(name, {"bits per image code": read_bits(row)}, decimals(2))
