"""Speech recognition and captioning by the text decoder: word error rates, and the rates without the right audio.

Both sides are normalised and tokenised as in words.py: lower case, no punctuation, scripts without spaces by character.
"""

from typing import Any

import numpy as np

from opt_ds.data.modalities import AUDIO, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.words import Words, normalize
from opt_ds.extras import needs_extra
from opt_ds.model.generation import DEFAULT_DECODING, DecodingConfig

with needs_extra("downstream", "the word error rate"):
    import jiwer

_CONSTANT_CANDIDATES, _CONSTANT_REFERENCES = 200, 300


def transcription(
    evaluator: Evaluator,
    split: str,
    inputs: tuple[str, ...] = ("A", "A+I", "I"),
    limit: int | None = None,
    seed: int = 1,
    options: DecodingConfig | None = None,
    ignored_words: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Return the word error rate of the text generated from each input, with two baselines.

    The baselines are the audio of other samples, and one constant caption (the training caption with the fewest errors
    on the training split). An input that no sample has together with a caption is omitted.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        inputs: Input modalities, keys of SUBSETS.
        limit: Maximum number of samples per input. None: all.
        seed: Seed of the choices and of the shuffled audio.
        options: Decoding options. None: the defaults.
        ignored_words: Normalised words that a second figure, `wer_of_other_words`, does not count. Frequent words that
            are easy to guess hide how well rare words are recognised.

    Returns:
        The figures, as plain values.

    Raises:
        UserError: No input is left.
    """
    options = options or DEFAULT_DECODING
    result: dict[str, Any] = {"split": split, "decoding": options.model_dump()}
    if ignored_words:
        result["ignored_words"] = sorted(ignored_words)
    for name in inputs:
        modalities = SUBSETS[name]
        gallery = evaluator.samples_with(split, (TEXT, *modalities), limit, seed)
        if not len(gallery):
            continue
        references = [evaluator.caption(index) for index in gallery]
        samples = [evaluator.read(index, modalities) for index in gallery]
        written = evaluator.write_text(samples, options)
        result[name] = {
            "wer": word_error_rate(references, written),
            "cer": character_error_rate(references, written),
            "samples": len(gallery),
            "references_beyond_model": evaluator.captions_beyond_model(gallery),
        }
        wordless = sum(not normalize(reference) for reference in references)
        if wordless:
            result[name]["references_without_words"] = wordless
        if ignored_words:
            result[name]["wer_of_other_words"] = _wer_of_other_words(references, written, ignored_words)
        if AUDIO in modalities and len(gallery) > 1:
            order = _shuffle(references, seed)
            for sample, other in zip(samples, order, strict=True):
                sample.items[AUDIO] = evaluator.read(gallery[other], (AUDIO,)).of(AUDIO)
            shuffled = evaluator.write_text(samples, options)
            result[name]["wer_shuffled_audio"] = word_error_rate(references, shuffled)
    if inputs and not any(name in result for name in inputs):
        raise UserError(
            f'{evaluator.store.path}: no sample of split "{split}" has text and an input to write it from '
            f"({', '.join(inputs)}): choose another split"
        )
    gallery = evaluator.require_samples(split, (TEXT,), limit, seed)
    constant = constant_caption(evaluator, seed)
    references = [evaluator.caption(index) for index in gallery]
    constants = [constant] * len(references)
    result["tokenization"] = Words.of(map(normalize, references)).name
    result["constant_caption"] = {"wer": word_error_rate(references, constants), "text": constant}
    if ignored_words:
        result["constant_caption"]["wer_of_other_words"] = _wer_of_other_words(references, constants, ignored_words)
    return result


def transcription_lines(figures: dict[str, Any]) -> list[str]:
    """Return the figures of `transcription` as text, one line per input."""
    names = {"A": "audio→text", "A+I": "audio+image→text", "I": "image→text"}
    lines = ["  word error rate"]
    for key, name in ((key, name) for key, name in names.items() if key in figures):
        row = figures[key]
        shuffled = f"   with shuffled audio {row['wer_shuffled_audio']:.1%}" if "wer_shuffled_audio" in row else ""
        others = f"   other words {row['wer_of_other_words']:.1%}" if "wer_of_other_words" in row else ""
        lines.append(f"    {name:<20}{row['wer']:>7.1%}{shuffled}{others}")
    constant = figures["constant_caption"]
    lines.append(f"    {'constant caption':<20}{constant['wer']:>7.1%}   (\"{constant['text']}\")")
    return lines


def word_error_rate(references: list[str], written: list[str]) -> float:
    """Return the number of edits divided by the number of reference words (jiwer), after normalisation.

    Scripts without spaces count by character (see words.py). References that become empty are dropped. Raise UserError
    if all do.
    """
    wanted, found = _normalized_pairs(references, written)
    words = Words.of(wanted)
    return float(jiwer.wer(list(map(words.spaced, wanted)), list(map(words.spaced, found))))


def character_error_rate(references: list[str], written: list[str]) -> float:
    """Return the same over characters. Spaces next to scripts without spaces do not count."""
    wanted, found = _normalized_pairs(references, written)
    words = Words.of(wanted)
    return float(jiwer.cer(list(map(words.unspaced, wanted)), list(map(words.unspaced, found))))


def _wer_of_other_words(references: list[str], written: list[str], ignored: frozenset[str]) -> float:
    words = Words.of(map(normalize, references))

    def others(text: str) -> str:
        return " ".join(word for word in words.split(normalize(text)) if word not in ignored)

    return word_error_rate([others(text) for text in references], [others(text) for text in written])


def _normalized_pairs(references: list[str], written: list[str]) -> tuple[list[str], list[str]]:
    pairs = [(normalize(r), normalize(w)) for r, w in zip(references, written, strict=True)]
    pairs = [(r, w) for r, w in pairs if r]
    if not pairs:
        raise UserError("no caption has a word left after removing punctuation and ignored words")
    return [r for r, _ in pairs], [w for _, w in pairs]


def constant_caption(evaluator: Evaluator, seed: int) -> str:
    """Return the training caption with the lowest error as the prediction for all samples.

    The error is measured on a sample of the training captions.
    """
    train = evaluator.require_samples(evaluator.config.data.train_split, (TEXT,), _CONSTANT_REFERENCES, seed)
    references = [evaluator.caption(index) for index in train]
    return min(references[:_CONSTANT_CANDIDATES], key=lambda text: word_error_rate(references, [text] * len(references)))


def _shuffle(captions: list[str], seed: int) -> np.ndarray:
    """Return a permutation without fixed points, so that each sample gets another one's audio.

    The other audio may have the same content.
    """
    order = np.random.default_rng(seed).permutation(len(captions))
    turned = np.roll(order, 1)
    other = np.empty_like(order)
    other[order] = turned
    return other
