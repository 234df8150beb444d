"""Image captioning: BLEU-4 (sacrebleu) and CIDEr (pycocoevalcap) of texts generated from images by beam search.

Both sides are normalised and tokenised as for word error rates (words.py: lower case, no punctuation, scripts without
spaces by character). The references of an image are all captions of the samples that share it. A figure that is
undefined for these captions is None, with the reason under `undefined`. Otherwise it would be 0 even for perfect
captions. Beside each figure stand that of one caption for all images, and that of the captions generated for other
images.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.evaluation.controls import Others, another, other_samples
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator, seeded_choice
from opt_ds.evaluation.figures import FIGURES, Figure, Measured, beside, figure_lines, measure
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.predictions import Row, score_of
from opt_ds.evaluation.reading import CAPTION_FORMS, read_captioning
from opt_ds.evaluation.transcription import constant_caption
from opt_ds.evaluation.words import Words, normalize
from opt_ds.extras import needs_extra
from opt_ds.model.generation import DEFAULT_DECODING, DecodingConfig

with needs_extra("downstream", "the evaluation of captions"):
    import sacrebleu
    from pycocoevalcap.cider.cider import Cider


def captioning(
    evaluator: Evaluator, split: str, limit: int | None = None, seed: int = 1, options: DecodingConfig | None = None,
    predictions: list[Row] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return BLEU-4 (0 … 100) and CIDEr (about 0 … 10) over the split's images.

    There are two baselines: one constant caption, and the captions generated for other images.

    CIDEr weights n-grams by their rarity among this split's references. It compares models on one split, not splits.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        limit: Maximum number of images, chosen by `seed`. Each image keeps all its captions.
        seed: Seed of the choice and of the constant caption.
        options: Decoding options. None: the defaults.
        predictions: Gets a row per image: the ids of its samples, its captions, the generated one, its scores.

    Returns:
        The figures, as plain values.
    """
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
    references = [list(map(normalize, texts)) for texts in captions]
    texts_n = evaluator.write_text([evaluator.read(i, SUBSETS["I"]) for i in images], options)
    written = list(map(normalize, texts_n))
    kept = np.array([place for place, texts in enumerate(references) if any(texts)], dtype=np.int64)
    wanted = [[text for text in references[place] if text] for place in kept]
    words = Words.of(text for texts in wanted for text in texts)
    own = [written[place] for place in kept]
    constants = [normalize(constant_caption(evaluator, seed))] * len(kept)
    others = other_samples(evaluator, images[kept], (IMAGE,), seed)
    found = scores(wanted, own)
    figures = _figures([name for name in _MEASURES if found[name] is not None], wanted, own, constants, others)
    if predictions is not None:
        ids = [[evaluator.store.sample_id(index) for index in own] for own in of_image.values()]
        scores_of = _scores_of_images(list(figures), wanted, own)
        by_place: dict[int, dict[str, Any]] = dict(zip(kept.tolist(), scores_of, strict=True))
        predictions += [
            {"id": of[0], "samples": of, "references": captions[place], "prediction": texts_n[place],
             "scores": by_place.get(place)}
            for place, of in enumerate(ids)
        ]  # fmt: skip
    from_others = {name: figure.controls.get(another(IMAGE)) for name, figure in figures.items()}
    return {
        "split": split, "images": len(images), "images_without_words": len(images) - len(kept),
        "tokenization": words.name, "references_beyond_model": beyond, "decoding": options.model_dump(), **found,
        FIGURES: beside(figures)[FIGURES],
        "constant_caption": {**scores(wanted, constants), "text": constants[0] if constants else ""},
        "another_image": {name: control.value if (control := from_others.get(name)) else None for name in _MEASURES},
    }  # fmt: skip


def _figures(
    names: list[str], references: list[list[str]], written: list[str], constants: list[str], others: Others
) -> dict[str, Figure]:
    """Return the figures of these names beside one caption for all, and beside the captions of other images."""
    words = Words.of(text for texts in references for text in texts)
    references = [list(map(words.spaced, texts)) for texts in references]
    # What the model generates for another image is what it would generate if this sample had that image.
    swapped = list(written)
    for place, other in zip(others.places, others.others, strict=True):
        swapped[place] = written[other]
    own, constant, another_image = (list(map(words.spaced, texts)) for texts in (written, constants, swapped))
    figures = {}
    for name in names:
        measurement = _MEASURES[name]
        controls = {"constant_caption": Measured(measurement(references, constant))}
        controls[another(IMAGE)] = Measured(measurement(references, another_image).at(others.places), others.places)
        figures[name] = measure(measurement(references, own), controls)
    return figures


def _scores_of_images(names: list[str], references: list[list[str]], written: list[str]) -> list[dict[str, Any]]:
    """Return the scores of each image. BLEU-4 is of all images together, so an image has its counts and lengths."""
    words = Words.of(text for texts in references for text in texts)
    references, written = [list(map(words.spaced, texts)) for texts in references], list(map(words.spaced, written))
    found: list[dict[str, Any]] = [{} for _ in written]
    for name in names:
        measurement = _MEASURES[name](references, written)
        for place, scores_of in enumerate(found):
            scores_of[name] = score_of(measurement, place, _PARTS.get(name))
    return found


_ALONE = "there is only one image"


def scores(references: list[list[str]], written: list[str]) -> dict[str, Any]:
    """Return BLEU-4 and CIDEr of normalised texts, each with one or more references.

    An undefined figure is None. Its reason is then under `undefined`.
    """
    words = Words.of(text for texts in references for text in texts)
    references = [list(map(words.spaced, texts)) for texts in references]
    written = list(map(words.spaced, written))
    undefined = {}
    if not references:
        undefined = dict.fromkeys(("bleu_4", "cider"), "no caption has a word")
    else:
        if all(len(text.split()) < 4 for texts in references for text in texts):
            undefined["bleu_4"] = "no caption has four words"
        if (reason := _cider_problem(references)) is not None:
            undefined["cider"] = reason
    found: dict[str, Any] = {
        name: None if name in undefined else measurement(references, written).value
        for name, measurement in _MEASURES.items()
    }
    return {**found, "undefined": undefined} if undefined else found


def _cider_problem(references: list[list[str]]) -> str | None:
    """Return why CIDEr is undefined, or None.

    n-grams are weighted by their rarity among the images, so n-grams that all images have carry no weight.
    """
    if len(references) < 2:
        return _ALONE
    own = [texts[0] for texts in references]
    return "all images have the same captions" if cider(references, own) <= 0 else None


def bleu_4(references: list[list[str]], written: list[str]) -> float:
    """Return the corpus BLEU of n-grams up to 4, as counted by sacrebleu, without smoothing.

    Words must be separated by spaces.
    """
    return _bleu_measurement(references, written).value


def cider(references: list[list[str]], written: list[str]) -> float:
    """Return CIDEr-D (Vedantam et al. 2015) as computed by pycocoevalcap, which needs at least two images."""
    return _cider_measurement(references, written).value


def _bleu_measurement(references: list[list[str]], written: list[str]) -> Measurement:
    """Return BLEU-4 as a function of sums over the images: matched and all n-grams, and both lengths."""
    parts = np.zeros((len(written), 10))
    for row, (texts, text) in enumerate(zip(references, written, strict=True)):
        found = sacrebleu.sentence_bleu(text, texts, tokenize="none", smooth_method="none", use_effective_order=True)
        parts[row] = *found.counts, *found.totals, found.sys_len, found.ref_len
    return Measurement(parts, _bleu)


def _bleu(times_bn: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return BLEU-4 (0 … 100) [b] of the sums of [n, 10]."""
    sums = times_bn @ parts
    with np.errstate(divide="ignore", invalid="ignore"):
        log_precision = np.log(np.nan_to_num(sums[:, :4] / sums[:, 4:8])).mean(1)
        log_penalty = np.minimum(0, 1 - sums[:, 9] / sums[:, 8])
        return 100 * np.nan_to_num(np.exp(log_precision + log_penalty))


def _cider_measurement(references: list[list[str]], written: list[str]) -> Measurement:
    """Return CIDEr-D, which is a mean over the images."""
    found = Cider().compute_score(dict(enumerate(references)), {number: [text] for number, text in enumerate(written)})[1]
    return Measurement.mean(np.asarray(found))


#: Measures whose terms per image have names.
_PARTS = {
    "bleu_4": (*(f"{kind}_{n}" for kind in ("matched", "ngrams") for n in range(1, 5)), "length", "reference_length"),
}
_MEASURES = {"bleu_4": _bleu_measurement, "cider": _cider_measurement}


def captioning_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures of `captioning` as text, with the controls below, and a line per undefined figure."""
    shown = read_captioning(figures)
    lines = figure_lines("image→text", shown, CAPTION_FORMS) if shown else []
    return lines + [f"  {metric} is undefined: {reason}" for metric, reason in figures.get("undefined", {}).items()]
