"""Visual question answering by the fine-tuned label head: the published VQA accuracy (Antol et al.

2015, §5), or agreement.

The inputs are a question's text and its image. The answer is the label with the highest score. The store's labels are
the annotators' answers, repeated as often as they were given (`opt-ds import vqa`). A question without labels has only
answers that are not labels, so no prediction is correct.

The published accuracy requires three agreeing annotators out of ten. If no question of the split has four answers, no
prediction could be correct by it. Then an answer that any annotator gave is correct (the max consensus of Malinowski et
al. 2015). Rare answers are not labels, so a question's own number of labels does not tell how many annotators it had,
but the split's maximum does.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.evaluation.controls import another, other_samples, with_others
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.figures import Measured, beside, figure_lines, measure, percent
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.reading import read_accuracy

ANNOTATORS = 10  # per question, as published
_FEWEST = 4  # Minimum number of answers per question for the published accuracy: without one of them, three can agree.


def vqa(evaluator: Evaluator, split: str, inputs: str = "T+I", limit: int | None = None, seed: int = 1) -> dict[str, Any]:
    """Return the accuracy (0 … 1) over the split's questions.

    `constant_answer` is the accuracy of the most frequent training answer. `best_possible` is the best accuracy that
    the head's labels allow. Beside the accuracy stand the constant answer, and the answers if the image or the question
    is another sample's.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        inputs: Input modalities, a key of SUBSETS.
        limit: Maximum number of questions. None: all.
        seed: Seed of the choice of questions.

    Returns:
        The figures, as plain values.

    Raises:
        UserError: The model has no head for answers, or the split has no answers.
    """
    names = evaluator.label_names
    if not evaluator.labels_are_answers:
        raise UserError("this model has no head for answers: opt-ds finetune vqa trains one")
    store = evaluator.store
    questions = evaluator.samples_with(split, SUBSETS[inputs], limit, seed)
    given = [Counter(store.labels(int(index))) for index in questions]
    if not any(given):
        raise UserError(f'{store.path}: no sample of split "{split}" has {inputs} and answers: opt-ds import vqa writes them')
    most = max(len(store.labels(int(index))) for index in evaluator.samples_with(split, SUBSETS[inputs]))
    annotators = most if most < _FEWEST else max(most, ANNOTATORS)
    scores = evaluator.label_scores([evaluator.read(index, SUBSETS[inputs]) for index in questions])
    answers = [names[place] for place in scores.argmax(1)]
    constant = _most_frequent(evaluator)

    def accuracy(chosen: list[str], wanted: list[Counter[str]]) -> Measurement:
        return Measurement.mean(
            np.array([answer_accuracy(counts, name, annotators) for counts, name in zip(wanted, chosen, strict=True)])
        )

    for_all = accuracy([constant] * len(given), given)
    controls = {"constant_answer": Measured(for_all)}
    others = other_samples(evaluator, questions, SUBSETS[inputs], seed)
    for modality in SUBSETS[inputs] if len(others.places) else ():
        swapped = evaluator.label_scores(with_others(evaluator, questions, SUBSETS[inputs], modality, others))
        chosen = [names[place] for place in swapped.argmax(1)]
        controls[another(modality)] = Measured(accuracy(chosen, [given[place] for place in others.places]), others.places)
    best = [
        max((answer_accuracy(counts, name, annotators) for name in counts if name in names), default=0.0)
        for counts in given
    ]
    return {
        "split": split, "inputs": inputs, "questions": len(questions), "answers": len(names),
        "annotators": annotators, "measure": "any annotator" if annotators < _FEWEST else "min(others / 3, 1)",
        **beside({"accuracy": measure(accuracy(answers, given), controls)}),
        "constant_answer": {"answer": constant, "accuracy": for_all.value},
        "best_possible": float(np.mean(best)),
    }  # fmt: skip


def vqa_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the accuracy as text, with its controls and upper bound below."""
    constant = figures["constant_answer"]
    return [
        *figure_lines(f"VQA, {figures['questions']} questions", {"accuracy": read_accuracy(figures)}, percent),
        f"      one answer for all: \"{constant['answer']}\"; best possible accuracy {figures['best_possible']:.1%}",
    ]


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


def _most_frequent(evaluator: Evaluator) -> str:
    counts: Counter[str] = Counter()
    for index in evaluator.store.split_samples(evaluator.config.data.train_split):
        counts.update(evaluator.store.labels(int(index)))
    return min(counts, key=lambda name: (-counts[name], name)) if counts else ""
