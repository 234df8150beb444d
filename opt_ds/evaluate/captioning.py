"""Image captioning: BLEU-4 (sacrebleu) and CIDEr (pycocoevalcap) of the text written from the image, by beam search.

Both sides are normalised as for word error rates (lower case, no punctuation); a picture's references are all captions of
samples that share it.
"""

from typing import Any

import numpy as np

from opt_ds.data.planned import IMAGE, TEXT
from opt_ds.evaluate.evaluator import SUBSETS, Evaluator, seeded_choice
from opt_ds.evaluate.transcription import constant_caption, normalize
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
    rows = evaluator.store.rows[samples, IMAGE]
    first = np.sort(np.unique(rows, return_index=True)[1])  # of the samples that share a picture
    pictures = seeded_choice(samples[first], limit, seed)
    references: dict[int, list[str]] = {int(row): [] for row in evaluator.store.rows[pictures, IMAGE]}
    for index, row in zip(samples, rows.tolist(), strict=True):
        if row in references:
            references[row].append(normalize(evaluator.caption(index)))
    written = [normalize(text) for text in evaluator.write_text([evaluator.read(i, SUBSETS["I"]) for i in pictures], options)]
    wanted = list(references.values())
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
    wanted = dict(enumerate(references))
    found = {number: [text] for number, text in enumerate(written)}
    return float(Cider().compute_score(wanted, found)[0])
