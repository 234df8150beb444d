"""Experiment: BLEU-4, CIDEr and other metrics of captions generated from images."""

from pathlib import Path
from typing import Any

from opt_ds.abilities import WRITE_TEXT
from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.evaluation.captioning import captioning, captioning_lines
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.experiments import Experiment, Request
from opt_ds.evaluation.predictions import Row, check_files, write_rows
from opt_ds.model.generation import DecodingConfig, text_decoding


class Captioning(Experiment):
    """See `opt_ds.evaluation.captioning`."""

    ability_in_training = WRITE_TEXT
    modalities = ((TEXT, IMAGE),)
    needs = ((WRITE_TEXT, "write text"),)

    def measure(
        self, request: Request, *, limit: int | None, beam_size: int, meteor: bool, predictions: Path | None
    ) -> dict[str, Any]:
        """Return the figures of `captioning`, by beam search, and write the predictions."""
        check_files(request.output, {"--predictions": predictions})
        rows: list[Row] = []
        options = text_decoding(beam_size)
        found = captioning(request.evaluator, request.split, limit, request.seed, options, rows, meteor)
        write_rows(predictions, rows, request.evaluator.is_main)
        return found

    def measure_in_training(self, evaluator: Evaluator, split: str, limit: int, seed: int) -> dict[str, Any]:
        """Return the figures of `captioning`, by greedy decoding."""
        return captioning(evaluator, split, limit, seed, DecodingConfig())

    def table(self, figures: dict[str, Any]) -> str:
        """Return the figures with their controls, and a line per undefined figure."""
        return "\n".join(captioning_lines(figures))


EXPERIMENT = Captioning()
