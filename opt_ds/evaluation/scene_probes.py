"""Linear probes of the frozen [CLS] for labels of scenes that need binding, such as "red cat" or "cat on the left".

Beside the mean average precision of a probe stand that of the same probe on an untrained encoder, that of a probe on the
true concepts of the scenes without their binding (which kinds, tints and axis there are), and that of a random order.

Legend: n samples, e width of [CLS], c labels, k concepts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from opt_ds.evaluation.average_precision import mean_average_precision, random_average_precision
from opt_ds.evaluation.evaluator import SUBSETS
from opt_ds.evaluation.figures import Measured, beside, measure
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.projections import ProjectionControls, Projections
from opt_ds.evaluation.ridge import fit_ridge
from opt_ds.scenes.labels import LABEL_KINDS, concepts, labels_with_kinds
from opt_ds.scenes.records import SceneRecord
from opt_ds.scenes.truth import SceneGraph

_FEWEST_POSITIVES = 10  # training samples per label


class Probed(NamedTuple):
    """What a probe is fitted on, and what it is tested on: sample indices int64 [n] and what the samples show."""

    train: np.ndarray
    test: np.ndarray
    train_scenes: Sequence[SceneGraph]
    test_scenes: Sequence[SceneGraph]

    @classmethod
    def of(cls, records: Mapping[int, SceneRecord], train: np.ndarray, test: np.ndarray) -> "Probed":
        """Return the samples with the scenes of their records."""
        train_scenes, test_scenes = ([records[int(index)].scene.graph for index in part] for part in (train, test))
        return cls(train, test, train_scenes, test_scenes)


class Labels(NamedTuple):
    """Labels that are probed: for each one its kind, and which training and test samples have it, bool [n, c]."""

    kinds: np.ndarray
    y_train_nc: np.ndarray
    y_test_nc: np.ndarray


def probe_figures(controls: ProjectionControls, probed: Probed, inputs: Sequence[str]) -> dict[str, Any]:
    """Return input -> figures: the mean average precision of the labels of each kind.

    A label is used if at least ten training samples, not all, and one test sample have it. So a binding that training
    never shows is not among them: a probe cannot know its label.

    Args:
        controls: The trained and the untrained encoder.
        probed: The samples. They have all modalities of the inputs.
        inputs: Input modalities, keys of SUBSETS.

    Returns:
        The figures as plain values; empty if no label can be used.
    """
    labels = probed_labels(probed)
    if not len(labels.kinds):
        return {}
    baseline = _by_kind(labels, _probe(_concept_counts(probed), labels))
    positives_c = labels.y_test_nc.sum(0)
    chance_c = random_average_precision(positives_c, len(probed.test))
    rows: dict[str, Any] = {}
    for name in inputs:
        own, untrained = (
            _by_kind(labels, _probe(_vectors(encoder, probed, name), labels))
            for encoder in (controls.trained, controls.untrained)
        )
        figures = {
            kind: measure(own[kind], {
                "chance": float(chance_c[labels.kinds == kind].mean()),
                "untrained_probe": Measured(untrained[kind]),
                "concepts_probe": Measured(baseline[kind]),
            })
            for kind in own
        }  # fmt: skip
        rows[name] = beside(figures)
    counts = {kind: int((labels.kinds == kind).sum()) for kind in LABEL_KINDS}
    facts = {"samples": len(probed.test), "train_samples": len(probed.train)}
    return {**rows, "labels": {kind: count for kind, count in counts.items() if count}, **facts}


def probed_labels(probed: Probed) -> Labels:
    """Return the labels that are used; see `probe_figures`."""
    of_train, of_test = (
        [labels_with_kinds(graph) for graph in scenes] for scenes in (probed.train_scenes, probed.test_scenes)
    )
    names = sorted({entry for own in of_train for entry in own})
    y_train_nc, y_test_nc = (_matrix(of_part, names) > 0 for of_part in (of_train, of_test))
    positives_c = y_train_nc.sum(0)
    used_c = (positives_c >= _FEWEST_POSITIVES) & (positives_c < len(y_train_nc)) & y_test_nc.any(0)
    kinds = np.array([kind for kind, _ in names], dtype=object)
    return Labels(kinds[used_c], y_train_nc[:, used_c], y_test_nc[:, used_c])


def _vectors(encoder: Projections, probed: Probed, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return [CLS] of some inputs of the training and of the test samples, float32 [n, e]."""
    return encoder.vectors(probed.train, SUBSETS[name]), encoder.vectors(probed.test, SUBSETS[name])


def _concept_counts(probed: Probed) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts of concepts of the training and of the test samples, float64 [n, k]."""
    of_train, of_test = (
        [list(concepts(graph).elements()) for graph in scenes] for scenes in (probed.train_scenes, probed.test_scenes)
    )
    names = sorted({name for own in of_train for name in own})
    return _matrix(of_train, names), _matrix(of_test, names)


def _matrix(of_samples: Sequence[Sequence[Any]], names: Sequence[Any]) -> np.ndarray:
    """Return how often each sample has each of the names, float64 [n, names]. Other names are ignored."""
    place = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(of_samples), len(names)))
    for row, own in enumerate(of_samples):
        for name in own:
            if name in place:
                counts[row, place[name]] += 1
    return counts


def _probe(train_and_test: tuple[np.ndarray, np.ndarray], labels: Labels) -> np.ndarray:
    """Return the scores of the test samples by a probe that is fitted on the training samples, float64 [n, c]."""
    x_train_ne, x_test_ne = train_and_test
    return fit_ridge(x_train_ne, labels.y_train_nc).predict(x_test_ne)


def _by_kind(labels: Labels, scores_nc: np.ndarray) -> dict[str, Measurement]:
    """Return kind -> mean average precision of its labels."""
    return {
        kind: mean_average_precision(labels.y_test_nc[:, own_c], scores_nc[:, own_c])
        for kind in LABEL_KINDS
        if (own_c := labels.kinds == kind).any()
    }
