"""Generated images judged by the truth of a scene, with the checker of the corpus.

Beside images generated from text and audio stand those of another sample's text or audio. The reconstructions of the
true images by the dVAE are what a perfect generator would reach; the true images tell how far the checker is right.
Beside both stands another sample's image, which is chance.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opt_ds.data.modalities import IMAGE
from opt_ds.data.sample import Sample
from opt_ds.evaluation.controls import Others, another, other_samples, with_others
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.figures import Measured, beside, measure
from opt_ds.evaluation.image_generation import DEFAULT_SAMPLING, generate_candidates, to_uint8
from opt_ds.evaluation.intervals import Measurement
from opt_ds.model.generation import DecodingConfig
from opt_ds.scenes.checker import compare, read_image
from opt_ds.scenes.parser import parse_caption
from opt_ds.scenes.records import SceneRecord
from opt_ds.scenes.truth import SceneGraph

if TYPE_CHECKING:
    from opt_ds.dvae.model import DiscreteVAE

#: Fields of a verdict (`opt_ds.scenes.checker.Verdict`), in the order in which they are printed.
VERDICTS = ("whole", "ground", "layout", "objects", "colour", "count", "size")
_NOTHING_TO_COMPARE = "no image of another sample has an object of the right kind"
#: Sum and number of a verdict per image, float64 [n, 2], by its name.
_Parts = dict[str, np.ndarray]


def generated_image_figures(
    evaluator: Evaluator,
    split: str,
    records: Mapping[int, SceneRecord],
    inputs: str,
    dvae: "DiscreteVAE",
    limit: int,
    seed: int,
    sampling: DecodingConfig = DEFAULT_SAMPLING,
) -> dict[str, Any]:
    """Return what fraction of the images, generated from `inputs`, show what the caption says.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        records: Sample index -> truth.
        inputs: Input modalities, a key of SUBSETS.
        dvae: Decoder of the image codes.
        limit: Maximum number of samples.
        seed: Seed of the choice of samples and of the other samples.
        sampling: Options of sampling image codes.
    """
    modalities = SUBSETS[inputs]
    gallery = evaluator.samples_with(split, (IMAGE, *modalities), limit, seed)
    own = [records[int(index)] for index in gallery]
    inputs_of_gallery = [evaluator.read(index, modalities) for index in gallery]
    seen = _seen(_generate(evaluator, dvae, inputs_of_gallery, sampling), own)
    others = other_samples(evaluator, gallery, (IMAGE, *modalities), seed)
    elsewhere = {}
    for modality in modalities if len(others.places) else ():
        if len(modalities) == 1:
            elsewhere[another(modality)] = [seen[other] for other in others.others]
        else:
            swapped = with_others(evaluator, gallery, modalities, modality, others)
            images = _generate(evaluator, dvae, swapped, sampling)
            elsewhere[another(modality)] = _seen(images, [own[place] for place in others.places])
    return _row(seen, own, elsewhere, others) | {"sampling": sampling.model_dump()}


def true_image_figures(
    evaluator: Evaluator, split: str, records: Mapping[int, SceneRecord], dvae: "DiscreteVAE", limit: int, seed: int
) -> dict[str, Any]:
    """Return the figures of the true images, if the store has their pixels, and of their reconstructions by the dVAE."""
    store = evaluator.store
    gallery = evaluator.samples_with(split, (IMAGE,), limit, seed)
    image_rows = [int(row) for row in store.rows[gallery, IMAGE]]
    codes = torch.from_numpy(np.stack([store.codes(row) for row in image_rows]).astype(np.int64))
    with torch.inference_mode():
        found = {
            "reconstruction": np.concatenate([to_uint8(dvae.decode(part.to(evaluator.device))) for part in codes.split(256)])
        }
    if store.has_pixels:
        found["true"] = np.stack([store.pixels(row) for row in image_rows])
    own = [records[int(index)] for index in gallery]
    others = other_samples(evaluator, gallery, (IMAGE,), seed)
    rows = {}
    for name, images in found.items():
        seen = _seen(images, own)
        elsewhere = {another(IMAGE): [seen[other] for other in others.others]} if len(others.places) else {}
        rows[name] = _row(seen, own, elsewhere, others)
    return rows


def judge_images(seen: Sequence[SceneGraph], asked: Sequence[SceneGraph]) -> _Parts:
    """Return the verdicts on what images show, given what they should show. A verdict of None counts as 0 of 0."""
    parts = {name: np.zeros((len(seen), 2)) for name in VERDICTS}
    for row, pair in enumerate(zip(seen, asked, strict=True)):
        verdict = compare(*pair)
        for name in VERDICTS:
            if (value := getattr(verdict, name)) is not None:
                parts[name][row] = float(value), 1
    return parts


def asked_of(record: SceneRecord) -> SceneGraph:
    """Return what the first caption of a scene says, which text and audio tell. It may leave out the ground."""
    return parse_caption(record.captions[0]) or record.scene.graph


def _row(
    seen: Sequence[SceneGraph], records: Sequence[SceneRecord], elsewhere: Mapping[str, list[SceneGraph]], others: Others
) -> dict[str, Any]:
    """Return the figures of images beside those of the images that another sample's input gives."""
    asked = [asked_of(record) for record in records]
    own = judge_images(seen, asked)
    controls = {name: judge_images(graphs, [asked[place] for place in others.places]) for name, graphs in elsewhere.items()}
    figures = {}
    for name in (name for name in VERDICTS if own[name][:, 1].any()):
        compared = {
            key: Measured(Measurement(parts[name]), others.places)
            for key, parts in controls.items()
            if parts[name][:, 1].any() and own[name][others.places, 1].any()
        }
        figures[name] = measure(Measurement(own[name]), compared, uncontrolled=_NOTHING_TO_COMPARE)
    return {**beside(figures), "samples": len(seen)}


def _generate(evaluator: Evaluator, dvae: "DiscreteVAE", samples: Sequence[Sample], sampling: DecodingConfig) -> np.ndarray:
    """Return one image per sample, uint8 [n, 3, 64, 64]."""
    return generate_candidates(evaluator, dvae, samples, sampling, 1)[:, 0]


def _seen(images: np.ndarray, records: Sequence[SceneRecord]) -> list[SceneGraph]:
    """Return what images uint8 [n, 3, 64, 64] show, each read in the drawing style of its scene."""
    return [read_image(image.transpose(1, 2, 0), record.scene.style) for image, record in zip(images, records, strict=True)]
