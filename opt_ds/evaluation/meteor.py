"""METEOR 1.5 for English (Denkowski & Lavie 2014), by the program that comes with pycocoevalcap. It runs on Java.

The program aligns a text with its references: equal words, stems, synonyms and paraphrases. It returns the terms of each
text. The score of all texts is a function of the sums of their terms, so it has a bootstrap interval.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np

from opt_ds.errors import RunError, UserError

# Parameters of English ("rank" task) in version 1.5: balance of recall, of fragmentation, its weight, of content words.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MATCHERS = np.array([1.0, 0.6, 0.8, 0.6])  # weights of equal words, stems, synonyms, paraphrases
_TERMS = 23
_NEEDS = "leave out --meteor, or install"


def find_program() -> tuple[str, Path]:
    """Return the Java interpreter and METEOR's program. Raise UserError if one is missing."""
    java, package = shutil.which("java"), find_spec("pycocoevalcap")
    if java is None:
        raise UserError(f"--meteor: METEOR runs on Java, and there is no java on the PATH: {_NEEDS} a Java runtime")
    folders = package.submodule_search_locations if package else None
    jar = Path(next(iter(folders or ()), "")) / "meteor" / "meteor-1.5.jar"
    if not jar.is_file():
        raise UserError(f"--meteor: there is no meteor-1.5.jar in pycocoevalcap: {_NEEDS} 'opt_ds[downstream]'")
    return java, jar


@contextmanager
def meteor_program() -> Iterator["Meteor"]:
    """Start METEOR's program, which reads its tables (about 10 s), and end it after the block."""
    java, jar = find_program()
    command = [java, "-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command, cwd=jar.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, encoding="utf-8",
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        try:
            yield Meteor(process.stdin, process.stdout)
        finally:
            process.kill()


class Meteor:
    """METEOR's running program."""

    def __init__(self, requests: IO[str], answers: IO[str]) -> None:
        self._requests, self._answers = requests, answers

    def terms(self, references: list[list[str]], written: list[str]) -> np.ndarray:
        """Return the terms of each text with its best reference, float64 [n, 23]. Raise RunError if the program ended."""
        found = np.zeros((len(written), _TERMS))
        for row, (texts, text) in enumerate(zip(references, written, strict=True)):
            answer = self._ask(" ||| ".join(["SCORE", *texts, text]))
            try:
                found[row] = [float(term) for term in answer.split()]
            except ValueError:
                raise RunError(f"METEOR's program gave no terms but {answer!r}: run it again without --meteor") from None
        return found

    def _ask(self, request: str) -> str:
        try:
            self._requests.write(request + "\n")
            self._requests.flush()
            return self._answers.readline().strip()
        except BrokenPipeError:
            return ""


def meteor_of_sums(times_bn: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Return METEOR (0 … 1) [b] of the sums of terms [n, 23].

    Terms: lengths of text and reference; their function words; for each of four matchers the matched content words of both,
    then the matched function words of both; chunks; matched words of both.
    """
    sums = times_bn @ terms
    lengths, functions, chunks, matched = sums[:, 0:2], sums[:, 2:4], sums[:, 20], sums[:, 21:23]
    weighted = (1 - _DELTA) * functions + _DELTA * (lengths - functions)
    by_matcher = sums[:, 4:20].reshape(-1, 4, 2, 2)  # matcher; content or function; text or reference
    found = np.einsum("m,bmkt,k->bt", _MATCHERS, by_matcher, np.array([_DELTA, 1 - _DELTA]))
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = (found / weighted).T
        mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        fragmentation = chunks / matched.mean(1)
    complete = (chunks == 1) & (matched == lengths).all(1)
    penalty = _GAMMA * np.where(complete, 0.0, fragmentation) ** _BETA
    return np.nan_to_num(mean * (1 - penalty), nan=0.0, posinf=0.0)
