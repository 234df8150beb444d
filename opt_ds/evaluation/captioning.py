"""Image captioning: BLEU-4 (sacrebleu) and CIDEr (pycocoevalcap) of the text written from the image, by beam search.

Both sides are normalised and cut into words as for word error rates (words.py: lower case, no punctuation, scripts without
spaces by character); a picture's references are all captions of samples that share it. A figure that the captions cannot have
is None, with the reason under `undefined`: it would be 0 for a perfect writer too.
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
    """BLEU-4 (0 … 100) and CIDEr (about 0 … 10) over the split's pictures, beside one constant caption and another picture's.

    `limit`: pictures at most, a seeded choice; each keeps all its captions. CIDEr weighs n-grams by their rarity among this
    split's references: it compares models on one split, not splits.
    """
    options = options or DEFAULT_DECODING
    samples = evaluator.require_samples(split, (TEXT, IMAGE))
    beyond = evaluator.captions_beyond_model(samples)
    rows = evaluator.store.rows[samples, IMAGE]
    first = np.sort(np.unique(rows, return_index=True)[1])  # of the samples that share a picture
    pictures = seeded_choice(samples[first], limit, seed)
    references: dict[int, list[str]] = {int(row): [] for row in evaluator.store.rows[pictures, IMAGE]}
    for index, row in zip(samples, rows.tolist(), strict=True):
        if row in references:
            references[row].append(normalize(evaluator.caption(index)))
    written = [normalize(text) for text in evaluator.write_text([evaluator.read(i, SUBSETS["I"]) for i in pictures], options)]
    wanted, written, wordless = _with_words(list(references.values()), written)
    words = Words.of(text for texts in wanted for text in texts)
    constant = normalize(constant_caption(evaluator, seed))
    alone = {"bleu_4": None, "cider": None, "undefined": {"bleu_4": _ALONE, "cider": _ALONE}}
    return {
        "split": split, "pictures": len(pictures), "pictures_without_words": wordless, "tokenization": words.name,
        "references_beyond_model": beyond, "decoding": options.model_dump(), **scores(wanted, written),
        "constant_caption": {**scores(wanted, [constant] * len(wanted)), "text": constant},
        "another_picture": scores(wanted, list(np.roll(written, 1))) if len(wanted) > 1 else alone,
    }  # fmt: skip


_ALONE = "there is only one picture"


def _with_words(references: list[list[str]], written: list[str]) -> tuple[list[list[str]], list[str], int]:
    """Leave out references without a word, and pictures that have no other; also return how many pictures those are."""
    pairs = [([text for text in texts if text], own) for texts, own in zip(references, written, strict=True)]
    kept = [(texts, own) for texts, own in pairs if texts]
    return [texts for texts, _ in kept], [own for _, own in kept], len(pairs) - len(kept)


def scores(references: list[list[str]], written: list[str]) -> dict[str, Any]:
    """BLEU-4 and CIDEr of normalised texts, each with one or more references; None where one is undefined, with `undefined`."""
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
    """n-grams are weighed by their rarity among the pictures: what all have weighs nothing."""
    if len(references) < 2:
        return _ALONE
    own = [texts[0] for texts in references]
    return "all pictures have the same captions" if cider(references, own) <= 0 else None


def bleu_4(references: list[list[str]], written: list[str]) -> float:
    """Corpus BLEU of n-grams up to 4, as sacrebleu counts them, without smoothing. Texts have spaces between their words."""
    most = max(map(len, references))
    columns: Any = [[texts[k] if k < len(texts) else None for texts in references] for k in range(most)]
    return float(sacrebleu.corpus_bleu(written, columns, tokenize="none", smooth_method="none").score)


def cider(references: list[list[str]], written: list[str]) -> float:
    """CIDEr-D (Vedantam et al. 2015) by pycocoevalcap, which needs at least two pictures."""
    wanted = dict(enumerate(references))
    found = {number: [text] for number, text in enumerate(written)}
    return float(Cider().compute_score(wanted, found)[0])
