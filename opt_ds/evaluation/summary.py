"""Summary at the end of a pre-training run: one table of all figures, each beside its controls.

`summarize` returns the content of `result.json`. docs/results.md defines each key.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opt_ds.abilities import GENERATE_IMAGES, WRITE_TEXT
from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.figures import decimals, figure_lines, percent
from opt_ds.evaluation.image_generation import ImageGenerator, bits_lines, bits_per_code
from opt_ds.evaluation.image_grid import draw_image_grid
from opt_ds.evaluation.projections import ProjectionControls
from opt_ds.evaluation.reading import IMAGE_INPUTS, read_loss, read_loss_accuracy
from opt_ds.evaluation.retrieval import retrieval, retrieval_lines
from opt_ds.evaluation.scene_truth import SampleCounts, SceneTruth, scene_lines
from opt_ds.evaluation.transcription import transcription, transcription_lines
from opt_ds.tasks.baselines import baseline_result
from opt_ds.training.validation import validate

if TYPE_CHECKING:
    from opt_ds.dvae.model import DiscreteVAE

RESULT_SCHEMA = 1
#: Numbers of samples per split of the figures judged by the truth of scenes; `opt-ds evaluate scenes` takes more.
SCENE_COUNTS = SampleCounts(limit=100, probe=400, generate=16)
#: Further splits have galleries this many times smaller, because the time of retrieval grows with their square.
_SMALLER = 4


def summarize(
    evaluator: Evaluator,
    dvae: "DiscreteVAE | None",
    splits: list[str],
    output: Path,
    candidates: int = 200,
    matching_candidates: int = 100,
    seed: int = 1,
    truth: Path | None = None,
) -> dict[str, Any]:
    """Evaluate on the validation split and on each held-out split.

    Tasks that the model was not trained for are omitted.

    Args:
        evaluator: The model and the store.
        dvae: Decoder of the image codes. None: no image grid and no generated images.
        splits: The held-out splits.
        output: Folder that image_grid-<split>.png is written to.
        candidates: Gallery size for retrieval by likelihood on the first split; on the others, a quarter of it.
        matching_candidates: The same for retrieval by the matching head. Triples have 50 on every split.
        seed: Seed of the choices of samples.
        truth: The truth file of the corpus `scenes` that the store was made of. None: no figures judged by it.

    Returns:
        The figures, as plain values.

    Raises:
        UserError: The truth file belongs to other samples.
    """
    started = time.perf_counter()
    config, store = evaluator.config, evaluator.store
    controls = ProjectionControls(evaluator, seed)
    scenes = _scene_truth(evaluator, dvae, truth, splits, controls) if truth is not None else None
    result = validate(evaluator.model, config, store, evaluator.device, evaluator.group)
    validated = time.perf_counter()
    baselines = baseline_result(config, [store])
    summary: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        "store": {"name": store.name, "fingerprint": store.fingerprint},
        "validation": {
            loss: {
                "loss": value, "baseline": baselines.losses.get(loss), "accuracy": result.accuracies.get(loss),
                "baseline_accuracy": baselines.accuracies.get(loss),
            }
            for loss, value in result.losses.items()
        },
        "splits": {},
    }  # fmt: skip
    seconds = {"validation": validated - started, "baselines": time.perf_counter() - validated}
    writes, can_generate = (config.can(ability) for ability in (WRITE_TEXT, GENERATE_IMAGES))

    def timed(name: str, measured: Any, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = measured(*arguments, **options)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        return found

    for split in splits:
        sizes = [size if split == splits[0] else max(2, size // _SMALLER) for size in (candidates, matching_candidates)]
        figures: dict[str, Any] = {
            "retrieval": timed("retrieval", retrieval, evaluator, split, *sizes, seed=seed, controls=controls),
            "transcription": timed(
                "transcription", transcription, evaluator, split, ("A", "A+I", "I") if writes else (), seed=seed
            ),
        }
        has_generated = can_generate and evaluator.has_samples(split, (TEXT, IMAGE))
        if store.has_codes and has_generated:
            figures["image_generation"] = timed("image generation", bits_per_code, evaluator, split)
        if store.has_codes and store.has_pixels and dvae is not None and has_generated:
            grid = output / f"image_grid-{split}.png"
            drawn = timed("image grid", draw_image_grid, evaluator, ImageGenerator(dvae), split, seed=seed)
            if evaluator.is_main:
                _save_image(drawn, grid)
            figures["image_grid"] = grid.name
        if scenes is not None:
            can_decode = dvae is not None or not store.has_codes  # without codes, the figures name the reason
            counts = SCENE_COUNTS if can_decode else SCENE_COUNTS._replace(generate=0)
            figures["scenes"] = timed("scenes", scenes.measure, split, counts)
        summary["splits"][split] = figures
    summary["seconds"], summary["seconds_by_part"] = time.perf_counter() - started, seconds
    return summary


def table(summary: dict[str, Any]) -> str:
    """Return the summary as text for a terminal."""
    lines = ["", "Validation"]
    for loss, row in summary["validation"].items():
        lines += figure_lines(loss, {"loss": read_loss(row)}, decimals(3))
        if row["accuracy"] is not None:
            lines += figure_lines(f"{loss}, accuracy", {"accuracy": read_loss_accuracy(row)}, percent)
    for split, figures in summary["splits"].items():
        lines += ["", f"Held-out split {split}", *retrieval_lines(figures["retrieval"])]
        lines += transcription_lines(figures["transcription"])
        if "image_generation" in figures:
            image = figures["image_generation"]
            lines += ["  image generation", *bits_lines(image, IMAGE_INPUTS[image["inputs"]])]
        lines += scene_lines(figures.get("scenes", {}))
    parts = ", ".join(f"{name} {took:.0f}" for name, took in summary.get("seconds_by_part", {}).items())
    return "\n".join([*lines, "", f"evaluated in {summary['seconds']:.0f} s ({parts})" if parts else ""]).rstrip()


def _scene_truth(
    evaluator: Evaluator, dvae: "DiscreteVAE | None", truth: Path, splits: list[str], controls: ProjectionControls
) -> SceneTruth:
    """Return the truth of the store's scenes. Raise UserError now, before anything is measured, if it is another's."""

    def open_dvae() -> "DiscreteVAE":
        assert dvae is not None, "without a dVAE, no images are generated"
        return dvae

    scenes = SceneTruth(evaluator, truth, open_dvae, seed=controls.trained.seed, controls=controls)
    for split in splits:
        scenes.records_of(split)
    return scenes


def _save_image(image: Any, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
