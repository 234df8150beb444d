"""Kinds of questions: VQA v2's question types, or those of the corpus `scenes`.

A store keeps the text of a question and its answers, and not its type. The type is in the annotation file that the question
was imported from. Questions of the corpus `scenes` tell their kind by their first words.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from opt_ds.data.modalities import TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.scenes.questions import question_kind
from opt_ds.store.foreign import read_json_object

#: Prefix of the ids that `opt-ds import vqa` gives.
QUESTION_ID_PREFIX = "question "
_MAX_BYTES = 1 << 30  # of an annotation file; VQA v2's largest one has about 300 MB


class QuestionKinds(NamedTuple):
    """The kinds of a store's questions, and where they are from: "annotations" or "text"."""

    of: Mapping[int, str]  # sample index -> kind; a question of unknown kind is missing
    source: str


def question_kinds(evaluator: Evaluator, split: str, annotations: Sequence[Path]) -> QuestionKinds | None:
    """Return the kinds of the questions of a split and of the training split.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        annotations: Files of annotations in VQA v2's format. None given: the kinds are those of the corpus `scenes`.

    Returns:
        The kinds. None: no file is given, and a question of the split is none of the corpus.

    Raises:
        UserError: A file is not readable, or knows no question of the split.
    """
    store, train_split = evaluator.store, evaluator.config.data.train_split
    types = {number: kind for path in annotations for number, kind in _question_types(path).items()}

    def kinds_of(name: str) -> dict[int, str | None]:
        questions = [int(index) for index in evaluator.samples_with(name, (TEXT,))]
        if not annotations:
            return {index: question_kind(evaluator.caption(index)) for index in questions}
        return {index: types.get(store.sample_id(index).removeprefix(QUESTION_ID_PREFIX)) for index in questions}

    found = kinds_of(split)
    if annotations and not any(found.values()):
        raise UserError(
            f'--annotations {annotations[0]}: it has no question of split "{split}" of {store.path}: give the annotation '
            "files that the store was imported from, one --annotations for each"
        )
    if not annotations and not all(found.values()):
        return None
    if train_split in store.description.split_names:
        found = kinds_of(train_split) | found
    known = {index: kind for index, kind in found.items() if kind is not None}
    return QuestionKinds(known, "annotations" if annotations else "text")


def _question_types(path: Path) -> dict[str, str]:
    """Return question id -> type of a file of annotations."""
    remedy = "give a file of annotations as VQA v2 has them, such as v2_mscoco_val2014_annotations.json"
    content = read_json_object(path, remedy, _MAX_BYTES)
    entries = content.get("annotations")
    found = {
        str(entry["question_id"]): entry["question_type"]
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and "question_id" in entry and isinstance(entry.get("question_type"), str)
    }
    if not found:
        raise UserError(f'{path}: no "annotations" with a question_id and a question_type: {remedy}')
    return found
