"""Experiment: BLEU-4 and CIDEr of captions generated from images."""

from typing import Any

from opt_ds.abilities import WRITE_TEXT
from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.evaluation.captioning import captioning
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.experiments import Experiment, Request
from opt_ds.model.generation import DecodingConfig, text_decoding


class Captioning(Experiment):
    """See `opt_ds.evaluation.captioning`."""

    ability_in_training = WRITE_TEXT
    modalities = ((TEXT, IMAGE),)
    needs = ((WRITE_TEXT, "write text"),)

    def measure(self, request: Request, *, limit: int | None, beam_size: int) -> dict[str, Any]:
        """Return the figures of `captioning`, by beam search."""
        return captioning(request.evaluator, request.split, limit, request.seed, text_decoding(beam_size))

    def measure_in_training(self, evaluator: Evaluator, split: str, limit: int, seed: int) -> dict[str, Any]:
        """Return the figures of `captioning`, by greedy decoding."""
        return captioning(evaluator, split, limit, seed, DecodingConfig())

    def table(self, figures: dict[str, Any]) -> str:
        """Return one line per caption source, and one per undefined figure."""
        rows = {"written": figures} | {name: figures[name] for name in ("another_image", "constant_caption")}
        lines = []
        for name, row in rows.items():
            bleu = "undefined" if row["bleu_4"] is None else f"{row['bleu_4']:>6.1f}"
            cider = "undefined" if row["cider"] is None else f"{row['cider']:>6.3f}"
            lines.append(f"  {name.replace('_', ' '):<20}BLEU-4 {bleu}   CIDEr {cider}")
        lines += [f"  {metric} is undefined: {reason}" for metric, reason in figures.get("undefined", {}).items()]
        return "\n".join(lines)


EXPERIMENT = Captioning()
