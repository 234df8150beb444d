"""Experiment: bits per image code, and metrics and a grid of images generated from text and audio."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from opt_ds.abilities import GENERATE_IMAGES
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.dvae.model import DiscreteVAE
from opt_ds.dvae.storage import load_store_dvae
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.experiments import Experiment, Request
from opt_ds.evaluation.image_generation import (
    ImageGenerator,
    bits_per_code,
    generation_figures,
    image_generation_lines,
    possible_inputs,
)
from opt_ds.evaluation.image_grid import draw_image_grid
from opt_ds.evaluation.image_networks import ClipScore, check_inception
from opt_ds.evaluation.reading import IMAGE_INPUTS
from opt_ds.evaluation.reranking import ImageRater, Reranker, choose_reranker
from opt_ds.log import ON_STDERR
from opt_ds.model.generation import image_decoding

_LOG = logging.getLogger(__name__)


class ImageGeneration(Experiment):
    """See `opt_ds.evaluation.image_generation`."""

    ability_in_training = GENERATE_IMAGES
    modalities = ((IMAGE, TEXT), (IMAGE, AUDIO))
    needs_image_codes = True
    needs = ((GENERATE_IMAGES, "generate images"),)

    def measure(
        self,
        request: Request,
        *,
        limit: int | None,
        dvae: Path | None,
        images: int,
        generate: int,
        candidates: int,
        rank_by: str | None,
        top_k: int,
        top_p: float,
        temperature: float,
        guidance: float,
        inception: Path | None,
        clip: Path | None,
        image_weights: Path | None,
    ) -> dict[str, Any]:
        """Return bits per code for each input and, on request, metrics of generated images and an image grid.

        Args:
            request: The model, the store and the split.
            limit: Maximum number of samples. None: all.
            dvae: Folder of the dVAE. None: the one that made the store's image codes.
            images: Number of rows of the image grid; 0: no grid.
            generate: Number of samples to generate images for; 0: none.
            candidates: Images generated per sample, of which the best one is kept.
            rank_by: Name of the reranker that compares them. None: the first one that the model learned.
            top_k: Sampling option.
            top_p: Sampling option.
            temperature: Sampling option.
            guidance: Sampling option.
            inception: Weights of Inception-v3 for the FID. None: no FID.
            clip: Folder of a CLIP model for the CLIP score. None: no CLIP score.
            image_weights: Weights of the image extractor. None: its package includes them.

        Returns:
            Figures per input.

        Raises:
            UserError: The model or the store does not allow what is requested.
        """
        evaluator, split, seed = request.evaluator, request.split, request.seed
        generates = images > 0 or generate > 0
        _check_possible(evaluator, generates)
        if generates and guidance != 1:
            evaluator.require_guidance()
        if inception is not None:
            check_inception(inception)
        if clip is not None:
            ClipScore(clip)
        inputs = possible_inputs(evaluator, split)
        rater = generator = None
        if generates:
            rater = request.open_rater(image_weights)
            if generate:
                _check_extractor(rater)
            reranker = _reranker(rater, inputs, rank_by) if candidates > 1 else None
            options = image_decoding(top_k, top_p, temperature, seed, guidance)
            generator = ImageGenerator(open_dvae(evaluator, dvae), options, candidates, reranker)
        figures: dict[str, Any] = {name: bits_per_code(evaluator, split, name, limit, seed) for name in inputs}
        if generator is not None and rater is not None and generate:
            count = min(generate, limit or generate)
            for name, row in figures.items():
                row["generated"] = generation_figures(
                    evaluator, split, name, generator, count, seed, rater.image_embedding, inception, clip
                )
        if generator is not None and images:
            figures["image_grid"] = _write_grid(request, generator, images)
        return figures

    def measure_in_training(self, evaluator: Evaluator, split: str, limit: int, seed: int) -> dict[str, Any]:
        """Return bits per code for each possible input."""
        names = possible_inputs(evaluator, split)
        return {name: bits_per_code(evaluator, split, name, limit, seed) for name in names}

    def table(self, figures: dict[str, Any]) -> str:
        """Return one line per input and metric, with its controls."""
        return "\n".join(image_generation_lines(figures))


def open_dvae(evaluator: Evaluator, folder: Path | None) -> DiscreteVAE:
    """Return the dVAE of a folder, or the one that made the store's image codes, on the evaluator's device."""
    store = evaluator.store
    dvae = DiscreteVAE.from_pretrained(folder) if folder else load_store_dvae(store.path, store.description)
    return dvae.to(evaluator.device)


def _check_extractor(rater: ImageRater) -> None:
    """Raise UserError if generated images cannot be compared with true ones, before any is generated."""
    try:
        rater.check_image_extractor()
    except UserError as error:
        raise UserError(f"{error}, or use --generate 0 to measure bits per code and draw the image grid only") from None


def _reranker(rater: ImageRater, inputs: Sequence[str], by: str | None) -> Reranker:
    """Return what compares the candidates. Log the inputs that it cannot be applied to."""
    modalities = {modality for name in inputs for modality in SUBSETS[name]}
    reranker = choose_reranker(rater, modalities, by)
    for name in (name for name in inputs if not reranker.accepts(SUBSETS[name])):
        kept = f"{reranker.name} cannot compare images with this input, a single one is generated"
        _LOG.info(f"note: {IMAGE_INPUTS[name]}: {kept}", extra=ON_STDERR)
    return reranker


def _check_possible(evaluator: Evaluator, generates: bool) -> None:
    store = evaluator.store
    if not store.has_codes:
        raise UserError(f"store {store.path}: it has no image codes: write them with opt-ds train-dvae --store {store.path}")
    if generates and not store.has_pixels:
        raise UserError(
            f"store {store.path}: it has no pixels to compare generated images with: use --generate 0 --images 0"
        )


def _write_grid(request: Request, generator: ImageGenerator, rows: int) -> str:
    """Draw the image grid into the folder of the figures' file and return its name. Only the main rank writes it."""
    grid = request.output.with_suffix(".png")
    drawn = draw_image_grid(request.evaluator, generator, request.split, rows, request.seed)
    if request.evaluator.is_main:
        grid.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn).save(grid)
    return grid.name


EXPERIMENT = ImageGeneration()
