"""Visual question answering by the fine-tuned label head: the published VQA accuracy (Antol et al. 2015, §5).

A question's text and picture go in; its answer is the name that scores most. The store's labels are the annotators' answers, as
often as they were given (`opt-ds import vqa`); a question without labels has answers that are no name, and none is right.
"""

from collections import Counter
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.evaluate.evaluator import SUBSETS, Evaluator

ANNOTATORS = 10  # of each question, as published


def vqa(evaluator: Evaluator, split: str, inputs: str = "T+I", limit: int | None = None, seed: int = 1) -> dict[str, Any]:
    """`accuracy`, 0 … 1, over the split's questions; beside it what the most frequent training answer gives, and
    `best_possible`, what the names of the head allow. Raises UserError for a model without a head for answers."""
    labels = evaluator.config.tasks.labels
    if labels is None or not labels.answers:
        raise UserError("this model has no head for answers: opt-ds finetune vqa trains one")
    store = evaluator.store
    questions = evaluator.samples_with(split, SUBSETS[inputs], limit, seed)
    given = [Counter(store.labels(int(index))) for index in questions]
    if not any(given):
        raise UserError(f'{store.path}: no sample of split "{split}" has {inputs} and answers: opt-ds import vqa writes them')
    scores = evaluator.label_scores([evaluator.read(index, SUBSETS[inputs]) for index in questions])
    answers = [labels.names[place] for place in scores.argmax(1)]
    constant = _most_frequent(evaluator)
    best = [max((answer_accuracy(counts, name) for name in counts if name in labels.names), default=0.0) for counts in given]
    return {
        "split": split, "inputs": inputs, "questions": len(questions), "answers": len(labels.names),
        "accuracy": float(np.mean([answer_accuracy(counts, answer) for counts, answer in zip(given, answers, strict=True)])),
        "constant_answer": {"answer": constant, "accuracy": float(np.mean([answer_accuracy(c, constant) for c in given]))},
        "best_possible": float(np.mean(best)),
    }  # fmt: skip


def answer_accuracy(given: Counter[str], answer: str) -> float:
    """min(number of other annotators who gave it / 3, 1), averaged over the ten choices of nine annotators.

    `given`: how often each answer was given, of ten (those that are no label are missing from it).
    """
    times = given[answer]
    without_one_of_them, without_another = min((times - 1) / 3, 1.0), min(times / 3, 1.0)
    return (times * without_one_of_them + (ANNOTATORS - times) * without_another) / ANNOTATORS if times else 0.0


def _most_frequent(evaluator: Evaluator) -> str:
    counts: Counter[str] = Counter()
    for index in evaluator.store.split_samples(evaluator.config.data.train_split):
        counts.update(evaluator.store.labels(int(index)))
    return min(counts, key=lambda name: (-counts[name], name)) if counts else ""
