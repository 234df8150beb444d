"""Image captioning: metrics of texts generated from images by beam search (caption_metrics.py).

The references of an image are all captions of the samples that share it. A figure that is
undefined for these captions is None, with the reason under `undefined`. Otherwise it would be 0 even for perfect
captions. Beside each figure stand that of one caption for all images, and that of the captions generated for other
images.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.evaluation.caption_metrics import METRICS, TERMS, Metric, sacrebleu_signature, why_undefined, with_meteor
from opt_ds.evaluation.controls import Others, another, other_samples
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator, seeded_choice
from opt_ds.evaluation.figures import FIGURES, Figure, Measured, beside, figure_lines, measure
from opt_ds.evaluation.meteor import find_program, meteor_program
from opt_ds.evaluation.predictions import Row, score_of
from opt_ds.evaluation.reading import CAPTION_FORMS, read_captioning
from opt_ds.evaluation.transcription import constant_caption
from opt_ds.evaluation.whisper_normalization import is_spaceless
from opt_ds.evaluation.words import Words, normalize
from opt_ds.model.generation import DEFAULT_DECODING, DecodingConfig

_COLUMNS = 3  # of a table on the terminal

#: Why there is no METEOR unless it is asked for.
NO_METEOR = "METEOR, for English captions: --meteor measures it, with Java"
_FOREIGN = "METEOR: it is for English, and most letters of these captions are of scripts without spaces"


def captioning(
    evaluator: Evaluator, split: str, limit: int | None = None, seed: int = 1, options: DecodingConfig | None = None,
    predictions: list[Row] | None = None, meteor: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return BLEU-4 and sacreBLEU (0 … 100), CIDEr (about 0 … 10), ROUGE-L and METEOR (0 … 1) over the split's images.

    There are two baselines: one constant caption, and the captions generated for other images.

    CIDEr weights n-grams by their rarity among this split's references. It compares models on one split, not splits.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        limit: Maximum number of images, chosen by `seed`. Each image keeps all its captions.
        seed: Seed of the choice and of the constant caption.
        options: Decoding options. None: the defaults.
        predictions: Gets a row per image: the ids of its samples, its captions, the generated one, its scores.
        meteor: Whether to measure METEOR, on the main rank, whose figures are the ones that are written.

    Returns:
        The figures, as plain values.

    Raises:
        UserError: METEOR is asked for and cannot run.
    """
    if meteor:
        find_program()
    options = options or DEFAULT_DECODING
    samples = evaluator.require_samples(split, (TEXT, IMAGE))
    beyond = evaluator.captions_beyond_model(samples)
    rows = evaluator.store.rows[samples, IMAGE]
    first = np.sort(np.unique(rows, return_index=True)[1])  # index of the first sample of each image
    images = seeded_choice(samples[first], limit, seed)
    of_image: dict[int, list[int]] = {int(row): [] for row in evaluator.store.rows[images, IMAGE]}
    for index, row in zip(samples, rows.tolist(), strict=True):
        if row in of_image:
            of_image[row].append(int(index))
    captions = [[evaluator.caption(index) for index in own] for own in of_image.values()]
    written = evaluator.write_text([evaluator.read(i, SUBSETS["I"]) for i in images], options)
    kept = np.array([place for place, texts in enumerate(captions) if any(map(normalize, texts))], dtype=np.int64)
    wanted = [[text for text in captions[place] if normalize(text)] for place in kept]
    own = [written[place] for place in kept]
    constants = [constant_caption(evaluator, seed)] * len(kept)
    others = other_samples(evaluator, images[kept], (IMAGE,), seed)
    with ExitStack() as stack:
        foreign = is_spaceless(text for texts in wanted for text in texts)
        counted = meteor and evaluator.is_main and len(kept) > 0 and not foreign
        metrics = with_meteor(stack.enter_context(meteor_program()).terms if counted else None)
        undefined = why_undefined(wanted)
        found = _values(metrics, wanted, own, undefined)
        figures = _figures(metrics, undefined, wanted, own, constants, others)
        constant = _values(metrics, wanted, constants, undefined)
        if predictions is not None:
            by_place = dict(zip(kept.tolist(), _scores_of_images(metrics, undefined, wanted, own), strict=True))
            predictions += [
                {
                    "id": evaluator.store.sample_id(of[0]), "samples": list(map(evaluator.store.sample_id, of)),
                    "references": captions[place], "prediction": written[place], "scores": by_place.get(place),
                }
                for place, of in enumerate(of_image.values())
            ]  # fmt: skip
    from_others = {name: figure.controls.get(another(IMAGE)) for name, figure in figures.items()}
    return {
        "split": split, "images": len(images), "images_without_words": len(images) - len(kept),
        "tokenization": Words.of(normalize(text) for texts in wanted for text in texts).name,
        "sacrebleu_signature": sacrebleu_signature(wanted) if wanted else None,
        "references_beyond_model": beyond, "decoding": options.model_dump(), **found,
        FIGURES: beside(figures)[FIGURES],
        "constant_caption": {**constant, "text": normalize(constants[0]) if constants else ""},
        "another_image": {name: control.value if (control := from_others.get(name)) else None for name in metrics},
        "not_measured": ([_FOREIGN] if foreign else []) if meteor else [NO_METEOR],
    }  # fmt: skip


def _figures(
    metrics: Mapping[str, Metric], undefined: Mapping[str, str], references: list[list[str]], written: list[str],
    constants: list[str], others: Others,
) -> dict[str, Figure]:  # fmt: skip
    """Return the defined figures beside one caption for all, and beside the captions of other images."""
    # What the model generates for another image is what it would generate if this sample had that image.
    swapped = list(written)
    for place, other in zip(others.places, others.others, strict=True):
        swapped[place] = written[other]
    figures = {}
    for name in (name for name in metrics if name not in undefined):
        metric = metrics[name]
        controls = {"constant_caption": Measured(metric(references, constants))}
        controls[another(IMAGE)] = Measured(metric(references, swapped).at(others.places), others.places)
        figures[name] = measure(metric(references, written), controls)
    return figures


def _scores_of_images(
    metrics: Mapping[str, Metric], undefined: Mapping[str, str], references: list[list[str]], written: list[str]
) -> list[dict[str, Any]]:
    """Return the scores of each image. BLEU is of all images together, so an image has its counts and lengths."""
    found: list[dict[str, Any]] = [{} for _ in written]
    for name in (name for name in metrics if name not in undefined):
        measurement = metrics[name](references, written)
        for place, scores_of in enumerate(found):
            scores_of[name] = score_of(measurement, place, TERMS.get(name))
    return found


def scores(references: list[list[str]], written: list[str]) -> dict[str, Any]:
    """Return the metrics of texts, each with one or more references.

    An undefined figure is None. Its reason is then under `undefined`.
    """
    return _values(METRICS, references, written, why_undefined(references))


def _values(
    metrics: Mapping[str, Metric], references: list[list[str]], written: list[str], undefined: dict[str, str]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: None if name in undefined else metric(references, written).value for name, metric in metrics.items()
    }
    return {**found, "undefined": undefined} if undefined else found


def captioning_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures of `captioning` as text, with the controls below, and a line per undefined figure."""
    shown = list(read_captioning(figures).items())
    lines = []
    for start in range(0, len(shown), _COLUMNS):
        name = "image→text" if start == 0 else "image→text, further metrics"
        lines += figure_lines(name, dict(shown[start : start + _COLUMNS]), CAPTION_FORMS)
    lines += [f"  {metric} is undefined: {reason}" for metric, reason in figures.get("undefined", {}).items()]
    lines += [f"  sacreBLEU: {signature}"] if (signature := figures.get("sacrebleu_signature")) else []
    return lines + [f"  * not measured: {what}" for what in figures.get("not_measured", [])]
