"""Speech recognition and captioning by the text decoder: word error rates, each beside its controls.

The controls are the audio or image of another sample and one caption for all. Both sides are normalised and tokenised as
in words.py: lower case, no punctuation, scripts without spaces by character. On request, the same texts are compared again
after Whisper's normalisers (whisper_normalization.py), the controls too.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from opt_ds.data.modalities import TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.controls import another, other_samples, with_others
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.figures import Measured, beside, figure_lines, measure, percent, read_figure
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.predictions import Row, score_of
from opt_ds.evaluation.reading import TEXT_INPUTS, read_error_rates, read_whisper_error_rates
from opt_ds.evaluation.whisper_normalization import NORMALIZERS, is_spaceless, whisper_normalizers
from opt_ds.evaluation.words import Words, normalize
from opt_ds.extras import needs_extra
from opt_ds.model.generation import DEFAULT_DECODING, DecodingConfig

with needs_extra("downstream", "the word error rate"):
    import jiwer

_CONSTANT_CANDIDATES, _CONSTANT_REFERENCES = 200, 300
#: Maximum number of samples per input that a control generates text for.
CONTROL_SAMPLES = 200

_OWN_NORMALIZATION = ("wer", "cer", "wer_of_other_words")

#: Returns edits and reference items of each pair of a reference and a generated text, float64 [n, 2].
_Edits = Callable[[list[str], list[str]], np.ndarray]


def transcription(
    evaluator: Evaluator,
    split: str,
    inputs: tuple[str, ...] = ("A", "A+I", "I"),
    limit: int | None = None,
    seed: int = 1,
    options: DecodingConfig | None = None,
    ignored_words: frozenset[str] = frozenset(),
    whisper: bool = False,
    predictions: list[Row] | None = None,
) -> dict[str, Any]:
    """Return the error rates of the text generated from each input, beside their controls.

    The controls are each modality of the input taken from another sample, and one constant caption (the training caption
    with the fewest errors on the training split). An input that no sample has together with a caption is omitted.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        inputs: Input modalities, keys of SUBSETS.
        limit: Maximum number of samples per input. None: all.
        seed: Seed of the choices.
        options: Decoding options. None: the defaults.
        ignored_words: Normalised words that a further figure, `wer_of_other_words`, does not count. Frequent words that
            are easy to guess hide how well rare words are recognised.
        whisper: Whether to add the error rates after Whisper's normalisers, `wer_whisper_<name>` and
            `cer_whisper_<name>`. What is missing for them stands under `not_measured`, one line each.
        predictions: Gets a row per sample and input: reference, prediction, edits and reference items of each rate.

    Returns:
        The figures, as plain values.

    Raises:
        UserError: No input is left.
    """
    options = options or DEFAULT_DECODING
    result: dict[str, Any] = {"split": split, "decoding": options.model_dump()}
    if ignored_words:
        result["ignored_words"] = sorted(ignored_words)
    measures: dict[str, _Edits] = {"wer": _word_edits, "cer": _character_edits}
    if ignored_words:
        measures["wer_of_other_words"] = partial(_edits_of_other_words, ignored=ignored_words)
    galleries = {name: evaluator.samples_with(split, (TEXT, *SUBSETS[name]), limit, seed) for name in inputs}
    if inputs and not any(map(len, galleries.values())):
        raise UserError(
            f'{evaluator.store.path}: no sample of split "{split}" has text and an input to write it from '
            f"({', '.join(inputs)}): choose another split"
        )
    references = [evaluator.caption(index) for index in evaluator.require_samples(split, (TEXT,), limit, seed)]
    if whisper:
        further, result["not_measured"] = _whisper_measures(references)
        measures |= further
    constant = constant_caption(evaluator, seed)
    for name, gallery in galleries.items():
        if len(gallery):
            result[name], texts, edits = _row(evaluator, gallery, SUBSETS[name], seed, options, measures, constant)
            if predictions is not None:
                predictions += _prediction_rows(evaluator, name, gallery, texts, edits)
    constants = [constant] * len(references)
    result["tokenization"] = Words.of(map(normalize, references)).name
    result["constant_caption"] = {"wer": word_error_rate(references, constants), "text": constant}
    if ignored_words:
        parts = _edits_of_other_words(references, constants, ignored_words)
        result["constant_caption"]["wer_of_other_words"] = _measured(parts).value
    return result


def _row(
    evaluator: Evaluator, gallery: np.ndarray, modalities: tuple[int, ...], seed: int, options: DecodingConfig,
    measures: Mapping[str, _Edits], constant: str,
) -> tuple[dict[str, Any], list[str], dict[str, np.ndarray]]:  # fmt: skip
    """Return the figures of one input, the generated texts, and edits and reference items of each rate [n, 2]."""
    references = [evaluator.caption(index) for index in gallery]
    written = evaluator.write_text([evaluator.read(index, modalities) for index in gallery], options)
    others = other_samples(evaluator, gallery, modalities, seed).limited(CONTROL_SAMPLES, seed)
    swapped = {
        another(modality): evaluator.write_text(with_others(evaluator, gallery, modalities, modality, others), options)
        for modality in (modalities if len(others.places) else ())
    }
    figures, parts_of = {}, {name: edits(references, written) for name, edits in measures.items()}
    for name, edits in measures.items():
        if name not in _OWN_NORMALIZATION and not parts_of[name][:, 1].any():
            continue  # Whisper's normalisers drop texts in brackets, which may be all of this input's references
        own = [references[place] for place in others.places]
        found = {key: edits(own, texts) for key, texts in swapped.items()}
        controls = {key: Measured(Measurement(parts), others.places) for key, parts in found.items() if parts[:, 1].any()}
        controls["constant_caption"] = Measured(Measurement(edits(references, [constant] * len(references))))
        figures[name] = measure(_measured(parts_of[name]), controls, lower_is_better=True)
    row = {
        **beside(figures), "samples": len(gallery), "references_beyond_model": evaluator.captions_beyond_model(gallery)
    }  # fmt: skip
    wordless = {"references_without_words": sum(not normalize(reference) for reference in references)}
    for name in (name for name in NORMALIZERS if f"wer_whisper_{name}" in figures):
        wordless[f"references_without_words_whisper_{name}"] = int((parts_of[f"wer_whisper_{name}"][:, 1] == 0).sum())
    return row | {key: count for key, count in wordless.items() if count}, written, parts_of


def _prediction_rows(
    evaluator: Evaluator, input_name: str, gallery: np.ndarray, written: list[str], parts: Mapping[str, np.ndarray]
) -> list[Row]:
    """Return one row per sample. `parts`: edits and reference items of each rate [n, 2]."""
    measurements = {name: Measurement(found) for name, found in parts.items()}
    return [
        {
            "id": evaluator.store.sample_id(int(index)), "input": input_name, "references": [evaluator.caption(index)],
            "prediction": written[place],
            "errors": {name: score_of(one, place, ("edits", "items")) for name, one in measurements.items()},
        }
        for place, index in enumerate(gallery)
    ]  # fmt: skip


def transcription_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures of `transcription` as text: a line per input, with its controls below."""
    lines = ["  word and character error rate"]
    for key, name in ((key, name) for key, name in TEXT_INPUTS.items() if key in figures):
        row = figures[key]
        shown = read_error_rates(figures, key)
        shown |= {"other words": read_figure(row, "wer_of_other_words")} if "wer_of_other_words" in row else {}
        lines += figure_lines(name, shown, percent)
        for further, rates in read_whisper_error_rates(row).items():
            lines += figure_lines(f"{name}, {further}", rates, percent)
    lines.append(f"    one caption for all: \"{figures['constant_caption']['text']}\"")
    if "characters" in figures.get("tokenization", ""):
        lines.append(f"    words are counted as {figures['tokenization']}: there, word error rate is character error rate")
    return lines + [f"  * not measured: {what}" for what in figures.get("not_measured", [])]


def word_error_rate(references: list[str], written: list[str]) -> float:
    """Return the number of edits divided by the number of reference words (jiwer), after normalisation.

    Scripts without spaces count by character (see words.py). References that become empty are dropped. Raise UserError
    if all do.
    """
    return _measured(_word_edits(references, written)).value


def character_error_rate(references: list[str], written: list[str]) -> float:
    """Return the same over characters. Spaces next to scripts without spaces do not count."""
    return _measured(_character_edits(references, written)).value


def _word_edits(references: list[str], written: list[str]) -> np.ndarray:
    words = Words.of(map(normalize, references))
    return _edits(references, written, lambda text: words.spaced(normalize(text)), jiwer.process_words)


def _character_edits(references: list[str], written: list[str]) -> np.ndarray:
    words = Words.of(map(normalize, references))
    return _edits(references, written, lambda text: words.unspaced(normalize(text)), jiwer.process_characters)


def _whisper_measures(references: list[str]) -> tuple[dict[str, _Edits], list[str]]:
    """Return the measures after Whisper's normalisers, and why some are missing.

    A text that is split into characters has no character error rate besides: it would be the same.
    """
    spaceless = is_spaceless(references)
    normalizers, missing = whisper_normalizers(spaceless)
    found: dict[str, _Edits] = {}
    for name, normalizer in normalizers.items():
        if not any(map(normalizer, references)):
            missing.append(f"the error rate by {NORMALIZERS[name]}: it leaves no word of any caption")
            continue
        found[f"wer_whisper_{name}"] = partial(_edits, prepare=normalizer, process=jiwer.process_words)
        if not spaceless:
            found[f"cer_whisper_{name}"] = partial(_edits, prepare=normalizer, process=jiwer.process_characters)
    return found, missing


def _edits_of_other_words(references: list[str], written: list[str], ignored: frozenset[str]) -> np.ndarray:
    words = Words.of(map(normalize, references))

    def others(text: str) -> str:
        return " ".join(word for word in words.split(normalize(text)) if word not in ignored)

    return _word_edits([others(text) for text in references], [others(text) for text in written])


def _edits(
    references: list[str], written: list[str], prepare: Callable[[str], str], process: Callable[[str, str], Any]
) -> np.ndarray:
    """Return edits and reference items per pair, float64 [n, 2].

    `prepare` normalises and tokenises both sides. A reference without a word counts as 0 of 0.
    """
    parts = np.zeros((len(references), 2))
    for row, pair in enumerate(zip(references, written, strict=True)):
        wanted, found = map(prepare, pair)
        if wanted:
            counts = process(wanted, found)
            wrong = counts.substitutions + counts.deletions
            parts[row] = wrong + counts.insertions, wrong + counts.hits
    return parts


def _measured(edits: np.ndarray) -> Measurement:
    """Return the error rate of edits and reference items. Raise UserError if there is no item."""
    if not edits[:, 1].any():
        raise UserError("no caption has a word left after removing punctuation and ignored words")
    return Measurement(edits)


def constant_caption(evaluator: Evaluator, seed: int) -> str:
    """Return the training caption with the lowest error as the prediction for all samples.

    The error is measured on a sample of the training captions.
    """
    train = evaluator.require_samples(evaluator.config.data.train_split, (TEXT,), _CONSTANT_REFERENCES, seed)
    references = [evaluator.caption(index) for index in train]
    wanted = [text for text in map(normalize, references) if text]
    if not wanted:
        raise UserError(f"{evaluator.store.path}: no caption of split {evaluator.config.data.train_split} has a word")
    words = Words.of(wanted)
    spaced = list(map(words.spaced, wanted))

    def errors(text: str) -> float:
        return jiwer.wer(spaced, [words.spaced(normalize(text))] * len(spaced))

    return min(references[:_CONSTANT_CANDIDATES], key=errors)
