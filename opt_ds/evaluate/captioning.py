"""Image captioning: BLEU-4 (sacrebleu) and CIDEr (pycocoevalcap) of the text written from the image, by beam search.

Both sides are normalised as for word error rates (lower case, no punctuation); a picture's references are all captions of
samples that share it.
"""

from typing import Any

import numpy as np
import sacrebleu

from opt_ds.data.planned import IMAGE, TEXT
from opt_ds.evaluate.evaluator import SUBSETS, Evaluator
from opt_ds.evaluate.transcription import DEFAULT_DECODING, constant_caption, normalize
from opt_ds.model.generation import DecodingConfig


def captioning(
    evaluator: Evaluator, split: str, limit: int | None = None, seed: int = 1, options: DecodingConfig | None = None
) -> dict[str, Any]:
    """BLEU-4 (0 … 100) and CIDEr (about 0 … 10) over the split's pictures, beside one constant caption and another picture's.

    CIDEr weighs n-grams by their rarity among this split's references: it compares models on one split, not splits.
    """
    options = options or DEFAULT_DECODING
    samples = evaluator.require_samples(split, (TEXT, IMAGE), limit, seed)
    rows = evaluator.store.rows[samples, IMAGE]
    references: dict[int, list[str]] = {}
    for index, row in zip(samples, rows, strict=True):
        references.setdefault(int(row), []).append(normalize(evaluator.caption(index)))
    first = {int(row): index for row, index in zip(rows[::-1], samples[::-1], strict=True)}
    pictures = list(references)
    read = [evaluator.read(first[row], SUBSETS["I"]) for row in pictures]
    written = [normalize(text) for text in evaluator.write_text(read, options)]
    wanted = [references[row] for row in pictures]
    constant = normalize(constant_caption(evaluator, seed))
    return {
        "split": split, "pictures": len(pictures), "decoding": options.model_dump(), **scores(wanted, written),
        "constant_caption": {**scores(wanted, [constant] * len(pictures)), "text": constant},
        "another_picture": scores(wanted, list(np.roll(written, 1))),
    }  # fmt: skip


def scores(references: list[list[str]], written: list[str]) -> dict[str, float]:
    """BLEU-4 and CIDEr of normalised texts, each with one or more references."""
    return {"bleu_4": bleu_4(references, written), "cider": cider(references, written)}


def bleu_4(references: list[list[str]], written: list[str]) -> float:
    """Corpus BLEU of n-grams up to 4, as sacrebleu counts them, without smoothing."""
    most = max(map(len, references))
    columns: Any = [[texts[k] if k < len(texts) else None for texts in references] for k in range(most)]
    return float(sacrebleu.corpus_bleu(written, columns, tokenize="none", smooth_method="none").score)


def cider(references: list[list[str]], written: list[str]) -> float:
    """CIDEr-D (Vedantam et al. 2015) by pycocoevalcap, which needs at least two pictures."""
    from pycocoevalcap.cider.cider import Cider

    wanted = dict(enumerate(references))
    found = {number: [text] for number, text in enumerate(written)}
    return float(Cider().compute_score(wanted, found)[0])
