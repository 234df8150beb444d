"""Generated texts judged by the truth of a scene: whether a text is true, and whether it is complete.

A text outside the grammar of the corpus is not true. Beside the fractions stand those with another sample's image or
audio, and those of the training caption that is true of most training scenes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from opt_ds.evaluation.controls import NO_OTHER, another, other_samples, with_others
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator, seeded_choice
from opt_ds.evaluation.figures import Measured, beside, measure
from opt_ds.evaluation.intervals import Measurement
from opt_ds.model.generation import DecodingConfig
from opt_ds.scenes.judging import graph_is_complete, graph_is_true
from opt_ds.scenes.parser import parse_caption
from opt_ds.scenes.records import SceneRecord
from opt_ds.scenes.sampling import TRAIN
from opt_ds.scenes.truth import SceneGraph

_CONSTANT_CANDIDATES, _CONSTANT_SCENES = 200, 500


def _is_complete(said: SceneGraph, truth: SceneGraph) -> bool:
    return graph_is_true(said, truth) and graph_is_complete(said, truth)


_JUDGES: dict[str, Callable[[SceneGraph, SceneGraph], bool]] = {"complete": _is_complete, "true": graph_is_true}


def text_figures(
    evaluator: Evaluator,
    split: str,
    records: Mapping[int, SceneRecord],
    inputs: str,
    limit: int | None,
    seed: int,
    options: DecodingConfig,
    constant: str | None,
) -> dict[str, Any]:
    """Return the fractions of texts, generated from `inputs`, that are complete and that are true.

    Args:
        evaluator: The model and the store.
        split: Name of the split.
        records: Sample index -> truth.
        inputs: Input modalities, a key of SUBSETS.
        limit: Maximum number of samples. None: all.
        seed: Seed of the choice of samples and of the other samples.
        options: Decoding options.
        constant: A caption that is judged for all samples. None: no such control.
    """
    modalities = SUBSETS[inputs]
    gallery = evaluator.samples_with(split, modalities, limit, seed)
    truths = [records[int(index)].scene.graph for index in gallery]
    texts = evaluator.write_text([evaluator.read(index, modalities) for index in gallery], options)
    others = other_samples(evaluator, gallery, modalities, seed)
    controls: dict[str, dict[str, Measured]] = {name: {} for name in _JUDGES}
    for modality in modalities if len(others.places) else ():
        if len(modalities) == 1:  # what it writes for the other sample's input, it has written already
            elsewhere = [texts[other] for other in others.others]
        else:
            elsewhere = evaluator.write_text(with_others(evaluator, gallery, modalities, modality, others), options)
        judged = judge_texts(elsewhere, [truths[place] for place in others.places])
        for name, measurement in judged.items():
            controls[name][another(modality)] = Measured(measurement, others.places)
    if constant is not None:
        for name, measurement in judge_texts([constant] * len(truths), truths).items():
            controls[name]["constant_caption"] = Measured(measurement)
    figures = {
        name: measure(measurement, controls[name], uncontrolled=NO_OTHER)
        for name, measurement in judge_texts(texts, truths).items()
    }
    outside = sum(parse_caption(text) is None for text in texts)
    return {**beside(figures), "samples": len(gallery), "outside_grammar": outside}


def judge_texts(texts: Sequence[str], truths: Sequence[SceneGraph]) -> dict[str, Measurement]:
    """Return the fractions of texts that are complete and that are true of their scenes."""
    said = [parse_caption(text) for text in texts]
    return {
        name: Measurement.mean(
            np.array([graph is not None and judge(graph, truth) for graph, truth in zip(said, truths, strict=True)])
        )
        for name, judge in _JUDGES.items()
    }


def truest_caption(records: Iterable[SceneRecord], seed: int) -> str | None:
    """Return the training caption that is true of most training scenes, among a seeded choice of both.

    None: there are no training scenes.
    """
    train = [record for record in records if record.split == TRAIN]
    if not train:
        return None
    chosen = seeded_choice(np.arange(len(train)), _CONSTANT_SCENES, seed)
    scenes = [train[place].scene.graph for place in chosen]

    def times_true(text: str) -> int:
        said = parse_caption(text)
        return 0 if said is None else sum(graph_is_true(said, scene) for scene in scenes)

    return max((train[place].captions[0] for place in chosen[:_CONSTANT_CANDIDATES]), key=times_true)
