"""Evaluation by the ground truth of the corpus `scenes`: generated texts, hard negatives, generated images.

A text is judged as a scene graph, so a paraphrase of a true caption is right. An image is judged by what it shows.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opt_ds.abilities import GENERATE_IMAGES, MATCH, WRITE_TEXT
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.figures import figure_lines, percent
from opt_ds.evaluation.reading import TEXT_INPUTS, read_scenes
from opt_ds.evaluation.scene_images import generated_image_figures, true_image_figures
from opt_ds.evaluation.scene_negatives import LIKELIHOOD_SCORE, MATCHING_SCORE, negative_figures
from opt_ds.evaluation.scene_texts import text_figures, truest_caption
from opt_ds.log import ON_STDERR
from opt_ds.model.generation import DEFAULT_DECODING, DecodingConfig
from opt_ds.scenes.records import SceneRecord, read_truth

if TYPE_CHECKING:
    from opt_ds.dvae.model import DiscreteVAE

_LOG = logging.getLogger(__name__)
#: Names of modalities that hard negatives are scored with.
_GIVEN = {"I": IMAGE, "A": AUDIO}


def scene_truth(
    evaluator: Evaluator,
    split: str,
    truth: Path,
    open_dvae: Callable[[], "DiscreteVAE"],
    *,
    limit: int | None = 200,
    generate: int = 100,
    seed: int = 1,
    options: DecodingConfig | None = None,
) -> dict[str, Any]:
    """Return the figures of generated texts, of hard negatives and of generated images, each beside its controls.

    What the model or the store does not allow is left out, and is named under `skipped`.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        truth: The truth file of the corpus that the store was made of.
        open_dvae: Returns the dVAE that decodes image codes. It is called if images are generated.
        limit: Maximum number of samples for texts and negatives. None: all.
        generate: Maximum number of samples that images are generated for; 0: none.
        seed: Seed of the choices and of sampling.
        options: Decoding options of texts. None: the defaults.

    Returns:
        The figures, as plain values.

    Raises:
        UserError: The truth file belongs to other samples, or nothing can be measured.
    """
    all_records = read_truth(truth)
    records = records_of(evaluator, split, truth, all_records)
    skipped: dict[str, str] = {}
    decoding = options or DEFAULT_DECODING
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "texts": lambda: _texts(evaluator, split, all_records, records, limit, seed, decoding, skipped),
        "negatives": lambda: _negatives(evaluator, split, records, limit, seed, skipped),
    }
    if generate:
        parts["images"] = lambda: _images(evaluator, split, records, open_dvae, generate, seed, skipped)
    found: dict[str, Any] = {"split": split, "seed": seed, "decoding": decoding.model_dump()}
    for name, part in parts.items():
        started = time.perf_counter()
        if rows := part():
            found[name] = rows
            _LOG.info(f"note: {name} measured in {time.perf_counter() - started:.1f} s", extra=ON_STDERR)
    if not parts.keys() & found.keys():
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UserError(f"{evaluator.store.path}: nothing can be measured ({reasons}): use another model or store")
    return found | {"skipped": skipped}


def records_of(evaluator: Evaluator, split: str, truth: Path, records: Mapping[str, SceneRecord]) -> dict[int, SceneRecord]:
    """Return sample index -> record of all samples of a split.

    Raises:
        UserError: A sample has no record, or its caption is not the record's.
    """
    store = evaluator.store
    found: dict[int, SceneRecord] = {}
    advice = f"give the {truth.name} of the corpus that {store.path} was made of"
    for index in map(int, store.split_samples(split)):
        name = store.sample_id(index)
        record = records.get(name)
        if record is None:
            raise UserError(f'{truth}: it has no sample "{name}", which split "{split}" of the store has: {advice}')
        if store.rows[index, TEXT] >= 0 and evaluator.caption(index) != record.captions[0]:
            raise UserError(f'{truth}: the caption of sample "{name}" is not that of the store: {advice}')
        found[index] = record
    return found


def _texts(
    evaluator: Evaluator, split: str, all_records: Mapping[str, SceneRecord], records: Mapping[int, SceneRecord],
    limit: int | None, seed: int, options: DecodingConfig, skipped: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Return input -> figures of generated texts, and the constant caption."""
    if not _can(evaluator, WRITE_TEXT, "texts", skipped):
        return {}
    inputs = [name for name in TEXT_INPUTS if evaluator.has_samples(split, SUBSETS[name])]
    if not inputs:
        skipped["texts"] = f'no sample of split "{split}" has an image or audio'
        return {}
    constant = truest_caption(all_records.values(), seed)
    rows: dict[str, Any] = {
        name: text_figures(evaluator, split, records, name, limit, seed, options, constant) for name in inputs
    }
    return rows | {"constant_caption": constant}


def _negatives(
    evaluator: Evaluator, split: str, records: Mapping[int, SceneRecord], limit: int | None, seed: int,
    skipped: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Return input -> score -> figures of hard negatives."""
    abilities = {LIKELIHOOD_SCORE: WRITE_TEXT, MATCHING_SCORE: MATCH}
    scores = [score for score, ability in abilities.items() if _can(evaluator, ability, f"negatives, {score}", skipped)]
    rows = {}
    for name, modality in _GIVEN.items():
        with_input = evaluator.samples_with(split, (TEXT, modality))
        if scores and any(records[int(index)].negatives for index in with_input):
            rows[name] = negative_figures(evaluator, split, records, modality, scores, limit, seed)
    if scores and not rows:
        skipped["negatives"] = f'no sample of split "{split}" has negatives, text, and an image or audio'
    return rows


def _images(
    evaluator: Evaluator, split: str, records: Mapping[int, SceneRecord], open_dvae: Callable[[], "DiscreteVAE"],
    count: int, seed: int, skipped: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Return input -> figures of generated images, beside the true images and their reconstructions."""
    store = evaluator.store
    if not evaluator.has_samples(split, (IMAGE,)):
        skipped["images"] = f'no sample of split "{split}" has an image'
        return {}
    if not _can(evaluator, GENERATE_IMAGES, "images", skipped):
        return {}
    if not store.has_codes:
        skipped["images"] = f"the store has no image codes: opt-ds train-dvae --store {store.path} writes them"
        return {}
    dvae = open_dvae()
    inputs = [name for name in ("T", "A", "T+A") if evaluator.has_samples(split, (IMAGE, *SUBSETS[name]))]
    rows = {name: generated_image_figures(evaluator, split, records, name, dvae, count, seed) for name in inputs}
    if not store.has_pixels:
        skipped["true images"] = "the store has no pixels"
    return rows | true_image_figures(evaluator, split, records, dvae, count, seed)


def _can(evaluator: Evaluator, ability: str, what: str, skipped: dict[str, str]) -> bool:
    """Return whether the model has an ability. If not, note why."""
    if not evaluator.config.can(ability):
        skipped[what] = f"the model was trained without {evaluator.config.tasks.loss_for(ability)}"
    return evaluator.config.can(ability)


def scene_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures of `scene_truth` as text: a line per figure with its controls below, and what is left out."""
    lines = []
    for title, _, rows in read_scenes(figures):
        lines.append(f"  {title}")
        for name, shown in rows:
            lines += figure_lines(name, shown, percent)
    if constant := figures.get("texts", {}).get("constant_caption"):
        lines.append(f'  one caption for all: "{constant}"')
    return lines + [f"  not measured: {what}: {reason}" for what, reason in figures.get("skipped", {}).items()]
