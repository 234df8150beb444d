"""Summary at the end of a pre-training run: one table of all figures, each with its trivial baseline.

`summarize` returns the content of `result.json`. docs/results.md defines each key.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opt_ds.abilities import GENERATE_IMAGES, WRITE_TEXT
from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.image_generation import ImageGenerator, bits_per_code
from opt_ds.evaluation.image_grid import draw_image_grid
from opt_ds.evaluation.retrieval import retrieval, retrieval_lines
from opt_ds.evaluation.transcription import transcription, transcription_lines
from opt_ds.tasks.baselines import trivial_baselines
from opt_ds.training.validation import validate

if TYPE_CHECKING:
    from opt_ds.dvae.model import DiscreteVAE

RESULT_SCHEMA = 1


def summarize(
    evaluator: Evaluator,
    dvae: "DiscreteVAE | None",
    splits: list[str],
    output: Path,
    candidates: int = 200,
    matching_candidates: int = 100,
    seed: int = 1,
) -> dict[str, Any]:
    """Evaluate on the validation split and on each held-out split.

    Tasks that the model was not trained for are omitted.

    Args:
        evaluator: The model and the store.
        dvae: Decoder of the image codes. None: no image grid.
        splits: The held-out splits.
        output: Folder that image_grid-<split>.png is written to.
        candidates: Gallery size for retrieval by likelihood.
        matching_candidates: Gallery size for retrieval by the matching head.
        seed: Seed of the choices of samples.

    Returns:
        The figures, as plain values.
    """
    started = time.perf_counter()
    config, store = evaluator.config, evaluator.store
    result = validate(evaluator.model, config, store, evaluator.device, evaluator.group)
    baselines = trivial_baselines(config, [store])
    summary: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        "store": {"name": store.name, "fingerprint": store.fingerprint},
        "validation": {
            loss: {"loss": value, "baseline": baselines.get(loss), "accuracy": result.accuracies.get(loss)}
            for loss, value in result.losses.items()
        },
        "splits": {},
    }
    writes, can_generate = (config.can(ability) for ability in (WRITE_TEXT, GENERATE_IMAGES))
    for split in splits:
        figures: dict[str, Any] = {
            "retrieval": retrieval(evaluator, split, candidates, matching_candidates, seed=seed),
            "transcription": transcription(evaluator, split, ("A", "A+I", "I") if writes else (), seed=seed),
        }
        has_generated = can_generate and evaluator.has_samples(split, (TEXT, IMAGE))
        if store.has_codes and has_generated:
            figures["image_generation"] = bits_per_code(evaluator, split)
        if store.has_codes and store.has_pixels and dvae is not None and has_generated:
            grid = output / f"image_grid-{split}.png"
            drawn = draw_image_grid(evaluator, ImageGenerator(dvae), split, seed=seed)
            if evaluator.is_main:
                _save_image(drawn, grid)
            figures["image_grid"] = grid.name
        summary["splits"][split] = figures
    summary["seconds"] = time.perf_counter() - started
    return summary


def table(summary: dict[str, Any]) -> str:
    """Return the summary as text for a terminal of 100 columns."""
    lines = ["", "Validation loss            loss   trivial baseline   accuracy"]
    for loss, row in summary["validation"].items():
        baseline = "—" if row["baseline"] is None else f"{row['baseline']:.3f}"
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        below = "" if row["baseline"] is None else ("below" if row["loss"] < row["baseline"] else "NOT BELOW")
        lines.append(f"  {loss:<20} {row['loss']:>9.3f}   {baseline:>9} {below:<9} {accuracy:>6}")
    for split, figures in summary["splits"].items():
        lines += ["", f"Held-out split {split}", *retrieval_lines(figures["retrieval"])]
        lines += transcription_lines(figures["transcription"])
        if "image_generation" in figures:
            image = figures["image_generation"]
            lines.append(
                f"  text→image: {image['bits_per_code']:.2f} bits per image code "
                f"(training frequencies: {image['unigram_bits_per_code']:.2f})"
            )
    return "\n".join(lines)


def _save_image(image: Any, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
