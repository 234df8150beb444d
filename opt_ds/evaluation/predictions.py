"""Predictions per sample as JSON Lines, for analyses of errors and for other programs' metrics.

An experiment collects one row per sample and input. Every rank has the texts of all ranks, so rank 0 writes a complete
file.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.errors import UserError
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.question_kinds import QUESTION_ID_PREFIX
from opt_ds.store.files import write_json, write_json_lines

#: One line of the file: id, references, prediction, scores.
Row = dict[str, Any]


def check_files(output: Path, further: Mapping[str, Path | None]) -> None:
    """Raise UserError if two options name the same file.

    Args:
        output: The file of --output.
        further: Option -> its file, or None if it was not given.
    """
    taken = {output.resolve(): "--output"}
    for option, path in further.items():
        if path is not None and (other := taken.setdefault(path.resolve(), option)) != option:
            raise UserError(f"{option} {path}: this is also the file of {other}: name another one")


def write_rows(path: Path | None, rows: Iterable[Row], is_main: bool) -> None:
    """Write the rows, atomically, on the main rank. None: no file was asked for."""
    if path is None or not is_main:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, rows)


def write_evalai(path: Path | None, rows: Iterable[Row], is_main: bool) -> None:
    """Write the answers of rows of VQA as EvalAI's server takes them, on the main rank. None: no file was asked for.

    The file is a list of {"question_id": int, "answer": str}.

    Raise UserError if a sample's id is not that of a question of `opt-ds import vqa`.
    """
    if path is None:
        return
    answers = [{"question_id": _question_id(row["id"]), "answer": row["prediction"]} for row in rows]
    if is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, answers)


def _question_id(sample_id: str) -> int:
    number = sample_id.removeprefix(QUESTION_ID_PREFIX)
    if number == sample_id or not (number.isascii() and number.isdigit()):
        raise UserError(
            f'--evalai: the sample "{sample_id}" is no question with a number: make the store of a manifest of opt-ds import vqa'
        )
    return int(number)


def score_of(measurement: Measurement, place: int, names: tuple[str, ...] | None = None) -> Any:
    """Return the value of a measurement for one sample alone, or its terms if they have `names`.

    Terms are for figures that are no mean over the samples, such as a rate of the errors of all samples.
    """
    if names is None:
        return measurement.at(np.array([place])).value
    return {name: _plain(value) for name, value in zip(names, measurement.parts[place].tolist(), strict=True)}


def _plain(value: float) -> float | int:
    return int(value) if value.is_integer() else value
