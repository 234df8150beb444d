"""Image captioning: BLEU-4 (sacrebleu) and CIDEr (pycocoevalcap) of texts generated from images by beam search.

Both sides are normalised and tokenised as for word error rates (words.py: lower case, no punctuation, scripts without
spaces by character). The references of an image are all captions of the samples that share it. A figure that is
undefined for these captions is None, with the reason under `undefined`. Otherwise it would be 0 even for perfect
captions.
"""

from typing import Any

import numpy as np

from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator, seeded_choice
from opt_ds.evaluation.transcription import constant_caption
from opt_ds.evaluation.words import Words, normalize
from opt_ds.extras import needs_extra
from opt_ds.model.generation import DEFAULT_DECODING, DecodingConfig

with needs_extra("downstream", "the evaluation of captions"):
    import sacrebleu
    from pycocoevalcap.cider.cider import Cider


def captioning(
    evaluator: Evaluator, split: str, limit: int | None = None, seed: int = 1, options: DecodingConfig | None = None
) -> dict[str, Any]:
    """Return BLEU-4 (0 … 100) and CIDEr (about 0 … 10) over the split's images.

    There are two baselines: one constant caption, and the captions generated for other images.

    CIDEr weights n-grams by their rarity among this split's references. It compares models on one split, not splits.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        limit: Maximum number of images, chosen by `seed`. Each image keeps all its captions.
        seed: Seed of the choice and of the constant caption.
        options: Decoding options. None: the defaults.

    Returns:
        The figures, as plain values.
    """
    options = options or DEFAULT_DECODING
    samples = evaluator.require_samples(split, (TEXT, IMAGE))
    beyond = evaluator.captions_beyond_model(samples)
    rows = evaluator.store.rows[samples, IMAGE]
    first = np.sort(np.unique(rows, return_index=True)[1])  # index of the first sample of each image
    images = seeded_choice(samples[first], limit, seed)
    references: dict[int, list[str]] = {int(row): [] for row in evaluator.store.rows[images, IMAGE]}
    for index, row in zip(samples, rows.tolist(), strict=True):
        if row in references:
            references[row].append(normalize(evaluator.caption(index)))
    written = [
        normalize(text) for text in evaluator.write_text([evaluator.read(i, SUBSETS["I"]) for i in images], options)
    ]
    wanted, written, wordless = _with_words(list(references.values()), written)
    words = Words.of(text for texts in wanted for text in texts)
    constant = normalize(constant_caption(evaluator, seed))
    alone = {"bleu_4": None, "cider": None, "undefined": {"bleu_4": _ALONE, "cider": _ALONE}}
    return {
        "split": split, "images": len(images), "images_without_words": wordless, "tokenization": words.name,
        "references_beyond_model": beyond, "decoding": options.model_dump(), **scores(wanted, written),
        "constant_caption": {**scores(wanted, [constant] * len(wanted)), "text": constant},
        "another_image": scores(wanted, list(np.roll(written, 1))) if len(wanted) > 1 else alone,
    }  # fmt: skip


_ALONE = "there is only one image"


def _with_words(references: list[list[str]], written: list[str]) -> tuple[list[list[str]], list[str], int]:
    """Drop references without a word, and images that then have no reference.

    Also return the number of dropped images.
    """
    pairs = [([text for text in texts if text], own) for texts, own in zip(references, written, strict=True)]
    kept = [(texts, own) for texts, own in pairs if texts]
    return [texts for texts, _ in kept], [own for _, own in kept], len(pairs) - len(kept)


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
    measures = {"bleu_4": bleu_4, "cider": cider}
    found: dict[str, Any] = {
        name: None if name in undefined else measure(references, written) for name, measure in measures.items()
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
    most = max(map(len, references))
    columns: Any = [[texts[k] if k < len(texts) else None for texts in references] for k in range(most)]
    return float(sacrebleu.corpus_bleu(written, columns, tokenize="none", smooth_method="none").score)


def cider(references: list[list[str]], written: list[str]) -> float:
    """Return CIDEr-D (Vedantam et al. 2015) as computed by pycocoevalcap, which needs at least two images."""
    wanted = dict(enumerate(references))
    found = {number: [text] for number, text in enumerate(written)}
    return float(Cider().compute_score(wanted, found)[0])
