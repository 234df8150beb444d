"""Metrics of captions, as functions of which images are counted, so that each has a bootstrap interval.

BLEU-4 and sacreBLEU (sacrebleu), CIDEr-D and ROUGE-L (pycocoevalcap) and METEOR 1.5 (Denkowski & Lavie 2014; meteor.py).
All take captions as they are. All but sacreBLEU normalise and tokenise them as in words.py: lower case, no punctuation,
scripts without spaces by character. sacreBLEU splits them by one of sacrebleu's tokenizers, in lower case.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.whisper_normalization import is_spaceless
from opt_ds.evaluation.words import Words, normalize
from opt_ds.extras import needs_extra

with needs_extra("downstream", "the evaluation of captions"):
    import sacrebleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

#: Returns the measurement of generated texts, one per image, by the captions of each image.
Metric = Callable[[list[list[str]], list[str]], Measurement]

#: Names of the terms of BLEU per image.
BLEU_TERMS = (*(f"{kind}_{n}" for kind in ("matched", "ngrams") for n in range(1, 5)), "length", "reference_length")


class _Texts(NamedTuple):
    """Normalised texts with one space between words."""

    references: list[list[str]]
    written: list[str]


def _spaced(references: list[list[str]], written: list[str]) -> _Texts:
    wanted = [[normalize(text) for text in texts] for texts in references]
    words = Words.of(text for texts in wanted for text in texts)
    return _Texts(
        [list(map(words.spaced, texts)) for texts in wanted], [words.spaced(normalize(text)) for text in written]
    )


def bleu_4(references: list[list[str]], written: list[str]) -> Measurement:
    """Return the corpus BLEU of n-grams up to 4 (0 … 100), as counted by sacrebleu, without smoothing."""
    counter = sacrebleu.BLEU(tokenize="none", smooth_method="none", effective_order=True)
    return Measurement(_bleu_terms(counter, *_spaced(references, written)), _bleu)


def bleu_sacrebleu(references: list[list[str]], written: list[str]) -> Measurement:
    """Return the corpus BLEU (0 … 100) of sacrebleu with its own tokenizer and smoothing, in lower case."""
    counter = sacrebleu.BLEU(lowercase=True, tokenize=sacrebleu_tokenizer(references), effective_order=True)
    return Measurement(_bleu_terms(counter, references, written), _smoothed_bleu)


def sacrebleu_signature(references: list[list[str]]) -> str:
    """Return sacrebleu's signature of `bleu_sacrebleu`, which papers quote beside the figure."""
    metric = sacrebleu.BLEU(lowercase=True, tokenize=sacrebleu_tokenizer(references))
    most = max(map(len, references))
    columns = [[texts[place] if place < len(texts) else None for texts in references] for place in range(most)]
    metric.corpus_score([texts[0] for texts in references], columns)  # type: ignore[arg-type]
    return str(metric.get_signature())


def sacrebleu_tokenizer(references: list[list[str]]) -> str:
    """Return the name of sacrebleu's tokenizer for texts like the references.

    It is "13a", except for scripts without spaces: "zh" for Chinese, "ja-mecab" for Japanese if MeCab is installed
    (`pip install 'sacrebleu[ja]'`), otherwise "char".
    """
    texts = [text for some in references for text in some]
    if not is_spaceless(texts):
        return "13a"
    if any("\N{HIRAGANA LETTER SMALL A}" <= char <= "\N{KATAKANA LETTER VO}" for text in texts for char in text):
        return "ja-mecab" if find_spec("MeCab") and find_spec("ipadic") else "char"
    return "zh" if "Han and kana" in Words.of(map(normalize, texts)).scripts else "char"


def _bleu_terms(counter: sacrebleu.BLEU, references: Sequence[Sequence[str]], written: Sequence[str]) -> np.ndarray:
    """Return BLEU_TERMS of each image, float64 [n, 10]."""
    parts = np.zeros((len(written), len(BLEU_TERMS)))
    for row, (texts, text) in enumerate(zip(references, written, strict=True)):
        found = counter.sentence_score(text, list(texts))
        parts[row] = *found.counts, *found.totals, found.sys_len, found.ref_len
    return parts


def _bleu(times_bn: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return BLEU-4 (0 … 100) [b] of the sums of [n, 10]."""
    sums = times_bn @ parts
    with np.errstate(divide="ignore", invalid="ignore"):
        log_precision = np.log(np.nan_to_num(sums[:, :4] / sums[:, 4:8])).mean(1)
        log_penalty = np.minimum(0, 1 - sums[:, 9] / sums[:, 8])
        return 100 * np.nan_to_num(np.exp(log_precision + log_penalty))


def _smoothed_bleu(times_bn: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return sacrebleu's score [b] of the sums of [n, 10], with its exponential smoothing of n-grams without a match."""
    found = []
    for sums in (times_bn @ parts).astype(int).tolist():
        matched, ngrams, (length, reference_length) = sums[:4], sums[4:8], sums[8:]
        found.append(sacrebleu.BLEU.compute_bleu(matched, ngrams, length, reference_length, smooth_method="exp").score)
    return np.array(found)


def cider(references: list[list[str]], written: list[str]) -> Measurement:
    """Return CIDEr-D (Vedantam et al. 2015) as computed by pycocoevalcap, a mean over the images.

    It needs at least two images.
    """
    wanted, found = _spaced(references, written)
    scores = Cider().compute_score(dict(enumerate(wanted)), {number: [text] for number, text in enumerate(found)})[1]
    return Measurement.mean(np.asarray(scores))


def rouge_l(references: list[list[str]], written: list[str]) -> Measurement:
    """Return ROUGE-L (Lin 2004; 0 … 1, β 1.2, the best reference) as computed by pycocoevalcap, a mean over the images."""
    wanted, found = _spaced(references, written)
    pairs = zip(wanted, found, strict=True)
    return Measurement.mean(np.array([Rouge().calc_score([text], texts) for texts, text in pairs]))


#: Name -> metric, and the names of its terms per image if it is no mean over the images.
METRICS: dict[str, Metric] = {
    "bleu_4": bleu_4, "cider": cider, "rouge_l": rouge_l, "bleu_sacrebleu": bleu_sacrebleu,
}  # fmt: skip
TERMS = {"bleu_4": BLEU_TERMS, "bleu_sacrebleu": BLEU_TERMS}


def why_undefined(references: list[list[str]]) -> dict[str, str]:
    """Return name -> why a metric is undefined for these captions: even perfect ones would have 0."""
    if not references:
        return dict.fromkeys(METRICS, "no caption has a word")
    spaced = _spaced(references, []).references
    undefined = {}
    if all(len(text.split()) < 4 for texts in spaced for text in texts):
        undefined["bleu_4"] = "no caption has four words"
    if not bleu_sacrebleu(references, [max(texts, key=len) for texts in references]).parts[:, 7].any():
        undefined["bleu_sacrebleu"] = "no caption has four words"
    if len(references) < 2:
        undefined["cider"] = "there is only one image"
    elif cider(references, [texts[0] for texts in references]).value <= 0:
        # n-grams are weighted by their rarity among the images, so n-grams that all images have carry no weight.
        undefined["cider"] = "all images have the same captions"
    return undefined


def with_meteor(score: Callable[[list[list[str]], list[str]], np.ndarray] | None) -> dict[str, Metric]:
    """Return the metrics, and METEOR if there is a function that counts its terms (see meteor.py)."""
    if score is None:
        return METRICS
    return METRICS | {"meteor": partial(_meteor, score)}


def _meteor(
    score: Callable[[list[list[str]], list[str]], np.ndarray], references: list[list[str]], written: list[str]
) -> Measurement:
    from opt_ds.evaluation.meteor import meteor_of_sums

    return Measurement(score(*_spaced(references, written)), meteor_of_sums)
