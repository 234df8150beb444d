"""Visual question answering by the fine-tuned label head: the published VQA accuracy (Antol et al.

2015, §5), or agreement.

The inputs are a question's text and its image. The answer is the label with the highest score. The store's labels are
the annotators' answers, repeated as often as they were given (`opt-ds import vqa`). A question without labels has only
answers that are not labels, so no prediction is correct.

The published accuracy requires three agreeing annotators out of ten. If no question of the split has four answers, no
prediction could be correct by it. Then an answer that any annotator gave is correct (the max consensus of Malinowski et
al. 2015). Rare answers are not labels, so a question's own number of labels does not tell how many annotators it had,
but the split's maximum does.

Legend: n questions.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opt_ds.data.sample import Sample
from opt_ds.errors import UserError
from opt_ds.evaluation.controls import another, other_inputs, with_others
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.figures import Figure, Measured, beside, figure_lines, measure, percent
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.predictions import Row, score_of
from opt_ds.evaluation.question_kinds import QuestionKinds
from opt_ds.evaluation.reading import NO_UNTRAINED_ANSWERS, read_answers

ANNOTATORS = 10  # per question, as published
_FEWEST = 4  # Minimum number of answers per question for the published accuracy: without one of them, three can agree.
_NO_TRAINING_KINDS = "the most frequent answer of each kind: --annotations of the training questions adds it"


def vqa(
    evaluator: Evaluator,
    split: str,
    inputs: str = "T+I",
    limit: int | None = None,
    seed: int = 1,
    kinds: QuestionKinds | None = None,
    untrained: Evaluator | None = None,
    predictions: list[Row] | None = None,
) -> dict[str, Any]:
    """Return the accuracy (0 … 1) over the split's questions, and over those of each kind.

    `constant_answer` is the accuracy of the most frequent training answer. `best_possible` is the best accuracy that
    the head's labels allow. Beside the accuracy stand the constant answer, the most frequent training answer of each kind
    of question, and the answers if the image or the question is another sample's, of the same kind.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        inputs: Input modalities, a key of SUBSETS.
        limit: Maximum number of questions. None: all.
        seed: Seed of the choice of questions and of the other samples.
        kinds: Kinds of the questions of this and of the training split. None: unknown.
        untrained: A model that was fine-tuned the same way from random weights, as a control.
        predictions: Gets a row per question: the annotators' answers, the model's, its accuracy, the kind.

    Returns:
        The figures, as plain values.

    Raises:
        UserError: The model has no head for answers, or the split has no answers.
    """
    if not evaluator.labels_are_answers:
        raise UserError("this model has no head for answers: opt-ds finetune vqa trains one")
    store, modalities = evaluator.store, SUBSETS[inputs]
    questions = evaluator.samples_with(split, modalities, limit, seed)
    given = [Counter(store.labels(int(index))) for index in questions]
    if not any(given):
        raise UserError(
            f'{store.path}: no sample of split "{split}" has {inputs} and answers: opt-ds import vqa writes them; for a test '
            "set without answers, --evalai writes the model's answers"
        )
    kind_n = np.array([kinds.of.get(int(index), "") if kinds else "" for index in questions], dtype=object)
    asked = _Questions(evaluator, questions, given, kind_n, _annotators(evaluator, split, modalities))
    frequent = _frequent_answers(evaluator, kinds)
    constant = frequent.get(None, "")
    knows_kinds = any(kind in frequent for kind in kind_n)
    answers = _answers(evaluator, asked.samples(modalities))
    answered = _Answered(
        own=asked.accuracy(answers),
        constant=asked.accuracy([constant] * len(given)),
        of_kind=asked.accuracy([frequent.get(kind, constant) for kind in kind_n]) if knows_kinds else None,
        untrained=asked.accuracy(_answers(untrained, asked.samples(modalities))) if untrained else None,
        others=_with_other_inputs(asked, modalities, seed),
    )
    if predictions is not None:
        predictions += _prediction_rows(asked, answers, answered.own)
    best = asked.best_possible()
    result = {
        "split": split, "inputs": inputs, "questions": len(questions), "answers": len(evaluator.label_names),
        "annotators": asked.annotators,
        "measure": "any annotator" if asked.annotators < _FEWEST else "min(others / 3, 1)",
        **beside({"accuracy": answered.figure(np.arange(len(given)), with_kinds=True)}),
        "constant_answer": {"answer": constant, "accuracy": answered.constant.value},
        "best_possible": float(best.mean()),
    }  # fmt: skip
    if kinds:
        result["kinds_from"] = kinds.source
        result["questions_of_unknown_kind"] = int((kind_n == "").sum())
        result["kinds"] = {
            kind: _kind_row(answered, np.flatnonzero(kind_n == kind), frequent.get(kind, constant), best)
            for kind in sorted({*kind_n} - {""})
        }
    missing = [] if untrained else [NO_UNTRAINED_ANSWERS]
    missing += [_NO_TRAINING_KINDS] if kinds and not knows_kinds else []
    return result | {"not_measured": missing}


def vqa_without_answers(
    evaluator: Evaluator, split: str, predictions: list[Row], inputs: str = "T+I", limit: int | None = None, seed: int = 1
) -> dict[str, Any]:
    """Answer the questions of a split that has no answers, such as a published test set. Its accuracy is not measured.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        predictions: Gets a row per question, without an accuracy.
        inputs: Input modalities, a key of SUBSETS.
        limit: Maximum number of questions. None: all.
        seed: Seed of the choice of questions.

    Returns:
        The numbers of questions and of answers that the model knows, and why there is no accuracy.
    """
    modalities = SUBSETS[inputs]
    questions = evaluator.require_samples(split, modalities, limit, seed)
    unknown = np.full(len(questions), "", dtype=object)
    asked = _Questions(evaluator, questions, [Counter[str]() for _ in questions], unknown, 0)
    predictions += _prediction_rows(asked, _answers(evaluator, asked.samples(modalities)), None)
    return {
        "split": split, "inputs": inputs, "questions": len(questions), "answers": len(evaluator.label_names),
        "not_measured": [f'the accuracy: no question of split "{split}" has answers in the store'],
    }  # fmt: skip


def has_answers(evaluator: Evaluator, split: str, inputs: str = "T+I") -> bool:
    """Return whether a question of the split has answers."""
    return any(evaluator.store.labels(int(index)) for index in evaluator.samples_with(split, SUBSETS[inputs]))


def _prediction_rows(asked: "_Questions", answers: list[str], accuracy: Measurement | None) -> list[Row]:
    """Return one row per question. Without answers there is no accuracy."""
    return [
        {
            "id": asked.evaluator.store.sample_id(int(index)), "question": asked.evaluator.caption(index),
            "references": dict(asked.given[place]), "prediction": answers[place],
            "accuracy": None if accuracy is None else score_of(accuracy, place), "kind": asked.kind_n[place] or None,
        }
        for place, index in enumerate(asked.index_n)
    ]  # fmt: skip


@dataclass(frozen=True)
class _Questions:
    """Questions of a split: the answers that annotators gave, and the kinds [n], "" if unknown."""

    evaluator: Evaluator
    index_n: np.ndarray
    given: list[Counter[str]]
    kind_n: np.ndarray
    annotators: int

    def samples(self, modalities: tuple[int, ...]) -> list[Sample]:
        """Return the inputs of the questions."""
        return [self.evaluator.read(index, modalities) for index in self.index_n]

    def accuracy(self, answers: list[str], places: np.ndarray | None = None) -> Measurement:
        """Return the accuracy of answers to the questions at `places` (None: to all)."""
        wanted = self.given if places is None else [self.given[place] for place in places]
        pairs = zip(wanted, answers, strict=True)
        return Measurement.mean(np.array([answer_accuracy(counts, name, self.annotators) for counts, name in pairs]))

    def best_possible(self) -> np.ndarray:
        """Return the best accuracy that the head's labels allow for each question, float64 [n]."""
        names = set(self.evaluator.label_names)
        return np.array([
            max((answer_accuracy(counts, name, self.annotators) for name in counts if name in names), default=0.0)
            for counts in self.given
        ])  # fmt: skip


@dataclass(frozen=True)
class _Answered:
    """The accuracy of the model on all questions, and those of its controls."""

    own: Measurement
    constant: Measurement
    of_kind: Measurement | None
    untrained: Measurement | None
    others: dict[str, Measured]

    def figure(self, places: np.ndarray, with_kinds: bool) -> Figure:
        """Return the accuracy on the questions at `places` (ascending) beside its controls.

        `with_kinds`: the most frequent answer of each kind is a control; otherwise it is the constant answer.
        """
        controls: dict[str, Measured | float] = {"constant_answer": Measured(self.constant.at(places))}
        if self.of_kind is not None:
            name = "constant_answer_of_kind" if with_kinds else "constant_answer"
            controls[name] = Measured(self.of_kind.at(places))
        if self.untrained is not None:
            controls["untrained_finetuned"] = Measured(self.untrained.at(places))
        for name, other in self.others.items():
            kept = np.isin(other.places, places)
            within = np.searchsorted(places, other.places[kept])
            controls[name] = Measured(other.measurement.at(np.flatnonzero(kept)), within)
        return measure(self.own.at(places), controls)


def _kind_row(answered: _Answered, places: np.ndarray, frequent: str, best: np.ndarray) -> dict[str, Any]:
    """Return the figures of the questions of one kind."""
    return {
        "questions": len(places), **beside({"accuracy": answered.figure(places, with_kinds=False)}),
        "constant_answer": frequent, "best_possible": float(best[places].mean()),
    }  # fmt: skip


def _with_other_inputs(asked: _Questions, modalities: tuple[int, ...], seed: int) -> dict[str, Measured]:
    """Return the accuracies if one modality is that of another question of the same kind."""
    evaluator, found = asked.evaluator, {}
    strata = np.unique(asked.kind_n.astype(str), return_inverse=True)[1]
    for modality in modalities:
        others = other_inputs(evaluator, asked.index_n, modality, strata, seed)
        if len(others.places):
            swapped = with_others(evaluator, asked.index_n, modalities, modality, others)
            accuracy = asked.accuracy(_answers(evaluator, swapped), others.places)
            found[another(modality)] = Measured(accuracy, others.places)
    return found


def _answers(evaluator: Evaluator, samples: list[Sample]) -> list[str]:
    """Return the answer with the highest score for each question."""
    return [evaluator.label_names[place] for place in evaluator.label_scores(samples).argmax(1)]


def _annotators(evaluator: Evaluator, split: str, modalities: tuple[int, ...]) -> int:
    """Return the number of annotators per question, from the largest number of answers in the split."""
    most = max(len(evaluator.store.labels(int(index))) for index in evaluator.samples_with(split, modalities))
    return most if most < _FEWEST else max(most, ANNOTATORS)


def vqa_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the accuracies as text, with controls and upper bound below, and what was not measured."""
    lines = []
    for row in read_answers(figures):
        lines += figure_lines(row.name, {"accuracy": row.figure}, percent)
        lines.append(f'      most frequent training answer: "{row.constant}"; best possible accuracy {row.best:.1%}')
    if unknown := figures.get("questions_of_unknown_kind"):
        lines.append(f"  {unknown} questions are of unknown kind: the annotations do not have them")
    return lines + [f"  * not measured: {what}" for what in figures.get("not_measured", [NO_UNTRAINED_ANSWERS])]


def answer_accuracy(given: Counter[str], answer: str, annotators: int = ANNOTATORS) -> float:
    """Return min(number of other annotators who gave the answer / 3, 1), averaged over leaving out each annotator.

    `given` maps each answer to how often it was given; answers that are not labels are missing. With fewer than four
    annotators the result is 1 for an answer that any of them gave.
    """
    times = given[answer]
    if annotators < _FEWEST:
        return float(times > 0)
    without_one_of_them, without_another = min((times - 1) / 3, 1.0), min(times / 3, 1.0)
    return (times * without_one_of_them + (annotators - times) * without_another) / annotators if times else 0.0


def _frequent_answers(evaluator: Evaluator, kinds: QuestionKinds | None) -> dict[str | None, str]:
    """Return kind -> the most frequent answer to the training questions of that kind; None -> that to all of them."""
    counts: defaultdict[str | None, Counter[str]] = defaultdict(Counter)
    store, train_split = evaluator.store, evaluator.config.data.train_split
    if train_split not in store.description.split_names:
        return {}
    for index in map(int, store.split_samples(train_split)):
        answers = store.labels(index)
        counts[None].update(answers)
        if kinds and index in kinds.of:
            counts[kinds.of[index]].update(answers)
    return {kind: min(found.items(), key=lambda item: (-item[1], item[0]))[0] for kind, found in counts.items() if found}
