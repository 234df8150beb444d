"""VQA v2 (Goyal et al. 2017): convert the published question and annotation files to a manifest.

A question is the text of a sample. The answers of its annotators are its labels, repeated as often as they were given.

Answers are normalised as in the published evaluation (Antol et al. 2015: numbers as digits, no articles, no
punctuation). Only frequent answers are labels, the usual answer vocabulary. A question without a frequent answer is
useless for training but counts in evaluation.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import (
    Entry,
    Unused,
    guarded,
    sample,
    split_and_file,
    split_of_name,
    typed,
    unused_files,
    write_import,
)
from opt_ds.ingest.importers.files import Files
from opt_ds.ingest.manifest import Skipped
from opt_ds.ingest.text_files import read_json

_LOG = logging.getLogger(__name__)
_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
           "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`?!]")


def import_vqa(
    questions: Sequence[str],
    annotations: Sequence[str],
    output: Path,
    *,
    images: Path,
    min_count: int = 9,
    unanswered: Sequence[str] = (),
) -> Path:
    """Write the manifest `output`.

    Questions without any label are dropped from the first file and from others of its split. In other files they are
    kept and count as answered wrong.

    Args:
        questions: Question files, each FILE or SPLIT=FILE.
        annotations: The annotation file of each question file.
        output: The manifest to write.
        images: The folder of the images, which are found by COCO's names in any subfolder.
        min_count: An answer becomes a label if it is the most frequent answer of at least this many questions of the
            first file (9 leaves 3,129 for VQA v2's train and validation questions).
        unanswered: Question files without annotations, such as those of the test set, each FILE or SPLIT=FILE. All their
            questions are kept, without labels.

    Raises:
        UserError: A file is not from VQA, no answer is frequent enough, or no file of questions is given.
    """
    image_files = Files(images, output, "image")
    if not (questions or unanswered):
        raise UserError("no questions: give --questions with --annotations, or --unanswered")
    if len(questions) != len(annotations):
        raise UserError(f"{len(questions)} question files and {len(annotations)} of annotations: give each its own")
    pairs = [(*split_and_file(q), split_and_file(a)[1]) for q, a in zip(questions, annotations, strict=True)]
    answers = {path: _answers(path) for _, _, path in pairs}
    names, trains = set[str](), set[Path]()
    if pairs:
        names = answer_vocabulary(answers[pairs[0][2]].of.values(), min_count)
        if not names:
            raise UserError(f"{pairs[0][2]}: no answer is the most frequent one of {min_count} questions: lower --min-count")
        _LOG.info(f"{len(names)} answers are labels")
        trains = {path for split, path, _ in pairs if split and split == pairs[0][0]} | {pairs[0][1]}
    files: list[tuple[str | None, Path, _Answers | None]] = [(split, path, answers[notes]) for split, path, notes in pairs]
    files += [(*split_and_file(path), None) for path in unanswered]
    entries = (
        entry
        for split, path, notes in files
        for entry in _entries(path, split, notes, names, image_files, keep_unlabelled=notes is None or path not in trains)
    )
    return write_import(output, chain(entries, unused_files([image_files])), source=str(files[0][1]))


def answer_vocabulary(answers: Iterable[list[str]], min_count: int) -> set[str]:
    """Return the answers that are the most frequent one of at least `min_count` questions.

    `answers`: those of each question.
    """
    most_frequent = Counter(Counter(given).most_common(1)[0][0] for given in answers if given)
    return {answer for answer, count in most_frequent.items() if count >= min_count and answer}


def normalized_answer(text: str) -> str:
    """Normalise an answer as in the published evaluation.

    The result is lower case, has no punctuation or articles, and has digits for number words.
    """
    text = " ".join(text.lower().split())
    text = re.sub(r"(?<!\d)\.(?!\d)|(?<=\d)\.(?!\d)", "", text)  # keeps a point within a number
    text = re.sub(r"(?<=\d),(?=\d)", "", text).replace(",", " ")
    words = _PUNCTUATION.sub(" ", text).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)


@dataclass(frozen=True)
class _Answers:
    """A file of annotations.

    `of`: question id -> normalised answers; `image`: question id -> id of its image or None.
    """

    subtype: str
    of: dict[Any, list[str]]
    image: dict[Any, Any]
    skipped: list[Skipped]


def _answers(path: Path) -> _Answers:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError(f'{path}: no "annotations" with answers: give v2_mscoco_…_annotations.json as published')
    found = _Answers(str(content.get("data_subtype", "")), {}, {}, [])
    for number, entry in enumerate(content["annotations"]):
        place = f"{path.name} annotation {number}"
        try:
            id = typed(entry["question_id"], (int, str), "question_id")
            answers = typed(entry["answers"], list, "answers")
        except (KeyError, TypeError) as error:
            found.skipped.append(Skipped(place, f"not as published: {place}: {error}"))
            continue
        if id in found.of:
            found.skipped.append(Skipped(place, f"annotated twice: question {id}"))
            continue
        good = [text for answer in answers if (text := _answer(answer)) is not None]
        if len(good) < len(answers):
            reason = f"an answer is no text: {len(answers) - len(good)} of {len(answers)} answers to question {id}"
            found.skipped.append(Skipped(place, reason))
        found.of[id], found.image[id] = good, entry.get("image_id")
    return found


def _answer(entry: Any) -> str | None:
    """Return the normalised answer of one annotator. Numbers are converted to text. None for anything else."""
    answer = entry.get("answer") if isinstance(entry, dict) else None
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    return normalized_answer(answer) if isinstance(answer, str) else None


def _entries(
    path: Path, split: str | None, answers: _Answers | None, names: set[str], image_files: Files, keep_unlabelled: bool
) -> Iterator[Entry]:
    """Yield the samples of a file of questions. `answers`: those of its annotations; None: it has none."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
        raise UserError(f'{path}: no list "questions": give v2_OpenEnded_mscoco_…_questions.json')
    subtype = str(content.get("data_subtype", ""))
    images_of = subtype.replace("test-dev", "test")  # the questions of test-dev2015 are about images of test2015
    if answers and subtype and answers.subtype and subtype != answers.subtype:
        other = answers.subtype
        raise UserError(f"{path}: questions of {subtype}, but its annotations are of {other}: give each its own")

    def question(entry: dict[str, Any]) -> Iterator[Entry]:
        image_id, number = int(entry["image_id"]), typed(entry["question_id"], (int, str), "question_id")
        id = f"question {number}"
        given = answers.of.get(number, []) if answers else []
        labels = tuple(answer for answer in given if answer in names)
        annotated = answers.image.get(number) if answers else None
        if answers and not given:
            yield Skipped(id, "the annotations have no answers to it")
        elif annotated is not None and annotated != entry["image_id"]:
            yield Skipped(id, f"it contradicts its annotation: image_id {entry['image_id']} and {annotated}")
        elif not (labels or keep_unlabelled):
            yield Skipped(id, "none of its answers is frequent enough to be a label")
        else:
            name = f"COCO_{images_of}_{image_id:012d}"
            yield sample(
                id,
                text=typed(entry["question"], str, "question"),
                files={"image": (name, image_files.by_stem(name) or image_files.by_stem(f"{image_id:012d}"))},
                labels=labels,
                group=f"image {entry['image_id']}",
                split=split or split_of_name(images_of),
            )

    if answers:
        yield from answers.skipped
        if rare := sum(answer not in names for given in answers.of.values() for answer in given):
            yield Unused("answers", rare, why=f"of {path.name}, too rare to be labels: --min-count")
    for number, entry in enumerate(content["questions"]):
        yield from guarded(f"question {number}", lambda entry=entry: question(entry))  # type: ignore[misc]
