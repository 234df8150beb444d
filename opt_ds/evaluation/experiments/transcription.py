"""Experiment: word error rate of the texts generated from audio and images."""

from pathlib import Path
from typing import Any

from opt_ds.abilities import WRITE_TEXT
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.experiments import Experiment, Request
from opt_ds.evaluation.predictions import Row, check_files, write_rows
from opt_ds.evaluation.transcription import transcription, transcription_lines
from opt_ds.evaluation.words import normalize
from opt_ds.model.generation import DecodingConfig, text_decoding


class Transcription(Experiment):
    """See `opt_ds.evaluation.transcription`."""

    ability_in_training = WRITE_TEXT
    modalities = ((TEXT, AUDIO), (TEXT, IMAGE))
    needs = ((WRITE_TEXT, "write text"),)

    def measure(
        self, request: Request, *, limit: int | None, beam_size: int, ignore_words: str, predictions: Path | None
    ) -> dict[str, Any]:
        """Return the figures of `transcription`, by beam search, and write the predictions."""
        check_files(request.output, {"--predictions": predictions})
        rows: list[Row] = []
        found = transcription(
            request.evaluator,
            request.split,
            limit=limit,
            seed=request.seed,
            options=text_decoding(beam_size),
            ignored_words=frozenset(normalize(ignore_words).split()),
            whisper=True,
            predictions=rows,
        )
        write_rows(predictions, rows, request.evaluator.is_main)
        return found

    def measure_in_training(self, evaluator: Evaluator, split: str, limit: int, seed: int) -> dict[str, Any]:
        """Return the figures of `transcription`, by greedy decoding."""
        return transcription(evaluator, split, limit=limit, seed=seed, options=DecodingConfig())

    def table(self, figures: dict[str, Any]) -> str:
        """Return one line per input."""
        return "\n".join(transcription_lines(figures))


EXPERIMENT = Transcription()
