"""Multi-modal classification (Liu et al.

2021, §4): mAP of a linear probe on the frozen [CLS], per subset of the modalities.

Legend: n samples, e width, c labels.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.controls import untrained
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.figures import Measured, beside, figure_lines, measure, percent
from opt_ds.evaluation.intervals import Measurement
from opt_ds.evaluation.reading import read_classification
from opt_ds.extras import needs_extra
from opt_ds.store.reader import FeatureStore

with needs_extra("downstream", "the classification probe"):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

_ITERATIONS = 2000


def classification(
    evaluator: Evaluator,
    split: str,
    train_split: str = "train",
    subsets: tuple[str, ...] | None = None,
    min_positives: int = 10,
    regularisation: float = 1.0,
    limit: int | None = None,
    seed: int = 1,
    with_untrained: bool = True,
) -> dict[str, Any]:
    """Return the mean average precision (0 … 1) of a linear probe, over the labels.

    The probe is one logistic regression per label on standardised [CLS] vectors.

    The samples are those that have all modalities that both splits have, so that all subsets are compared on the same
    samples. A label is used if at least `min_positives` training samples and one test sample have it. `chance` is the
    mAP of uninformative scores, which is the labels' mean frequency. If the model has the head of `opt-ds finetune
    classification`, `head_mAP` is the mAP of that head on the same labels. Beside each figure stand chance and the same
    probe on an untrained encoder.

    Args:
        evaluator: The model and the store.
        split: The split to test on.
        train_split: The split to fit on.
        subsets: Subsets of the modalities. None: all subsets of the modalities that both splits have.
        min_positives: Minimum number of training samples per label.
        regularisation: scikit-learn's C.
        limit: Maximum number of samples per split. None: all.
        seed: Seed of the choice of samples.
        with_untrained: Whether the probe is fitted to an untrained encoder too. Without it, chance is the only control.

    Returns:
        The figures, as plain values.

    Raises:
        UserError: No sample or no label is left.
    """
    splits = (train_split, split)
    there = [part for part in (TEXT, IMAGE, AUDIO) if all(evaluator.has_samples(name, (part,)) for name in splits)]
    train, test = (evaluator.require_samples(name, there, limit, seed) for name in splits)
    subsets = subsets or tuple(name for name, modalities in SUBSETS.items() if set(modalities) <= set(there))
    names, y_train_nc, y_test_nc = label_matrices(evaluator.store, train, test, min_positives)
    without_training = untrained(evaluator) if with_untrained else None
    chance = float(y_test_nc.mean(0).mean())
    rows: dict[str, Any] = {}

    def probed(encoder: Evaluator, subset: str) -> tuple[np.ndarray, int]:
        x_train_ne, x_test_ne = (_cls(encoder, samples, subset) for samples in (train, test))
        return _probe(x_train_ne, y_train_nc, x_test_ne, regularisation)

    for subset in subsets:
        scores_nc, unconverged = probed(evaluator, subset)
        controls: dict[str, Measured | float] = {"chance": chance}
        if without_training is not None:
            controls["untrained_probe"] = Measured(_mean_average_precision(y_test_nc, probed(without_training, subset)[0]))
        figures = {"mAP": measure(_mean_average_precision(y_test_nc, scores_nc), controls)}
        if evaluator.label_names:
            head_nc = _head_scores(evaluator, test, subset, names)
            figures["head_mAP"] = measure(_mean_average_precision(y_test_nc, head_nc), controls)
        precision_c = average_precision_score(y_test_nc, scores_nc, average=None)
        rows[subset] = {**beside(figures), "labels_not_converged": unconverged,
                        "average_precision": dict(zip(names, map(float, precision_c), strict=True))}  # fmt: skip
    return {
        "split": split, "train_split": train_split, "train_samples": len(train), "test_samples": len(test),
        "labels": len(names), "min_positives": min_positives, "regularisation": regularisation,
        "chance": chance, "subsets": rows, **({"untrained_seed": evaluator.config.seed} if with_untrained else {}),
    }  # fmt: skip


def classification_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures as text, with a line per subset and its controls below."""
    lines = [
        f"mAP of a linear probe on the frozen [CLS], {figures['labels']} labels, {figures['test_samples']} samples of "
        f"{figures['split']} ({figures['train_samples']} to train on)"
    ]
    for subset, shown in read_classification(figures).items():
        lines += figure_lines(subset, shown, percent)
    return lines


def label_matrices(
    store: FeatureStore, train: np.ndarray, test: np.ndarray, min_positives: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the labels that are used (see `classification`) and which samples have them.

    Args:
        store: The store.
        train: int64, sample indices to fit on.
        test: int64, sample indices to test on.
        min_positives: Minimum number of training samples per label.

    Returns:
        The labels' names, and bool [n, c] of the training and of the test samples.

    Raises:
        UserError: No label is left.
    """
    all_names = store.description.label_names
    column = {name: number for number, name in enumerate(all_names)}

    def matrix(samples: np.ndarray) -> np.ndarray:
        y_nc = np.zeros((len(samples), len(all_names)), dtype=bool)
        for row, index in enumerate(samples):
            y_nc[row, [column[name] for name in store.labels(int(index))]] = True
        return y_nc

    y_train_nc, y_test_nc = matrix(train), matrix(test)
    positives_c = y_train_nc.sum(0)
    kept = (positives_c >= min_positives) & (positives_c < len(train)) & y_test_nc.any(0)
    if not kept.any():
        raise UserError(
            f"{store.path}: no label has {min_positives} samples of {len(train)} to train on and one to test: prepare the store "
            "with `labels` in the manifest, or lower --min-positives"
        )
    return [name for name, keep in zip(all_names, kept, strict=True) if keep], y_train_nc[:, kept], y_test_nc[:, kept]


def _cls(evaluator: Evaluator, samples: np.ndarray, subset: str) -> np.ndarray:
    """Return the encoder's [CLS] of the samples' subset, float32 [n, e]."""
    return evaluator.cls_vectors([evaluator.read(index, SUBSETS[subset]) for index in samples])


def _mean_average_precision(y_nc: np.ndarray, scores_nc: np.ndarray) -> Measurement:
    """Return the mAP (scikit-learn's) of scores as a function of how often each sample is counted."""
    labels = y_nc.shape[1]

    def statistic(times_bn: np.ndarray, parts: np.ndarray) -> np.ndarray:
        found = [_average_precision(times_bn, parts[:, c] > 0, parts[:, labels + c]) for c in range(labels)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a draw without any label
            return np.nanmean(np.stack(found), axis=0)

    return Measurement(np.concatenate([y_nc, scores_nc], axis=1).astype(np.float64), statistic)


def _average_precision(times_bn: np.ndarray, y_n: np.ndarray, scores_n: np.ndarray) -> np.ndarray:
    """Return the average precision [b] of one label; NaN for resamples without a positive sample."""
    order = np.argsort(-scores_n, kind="stable")
    ranked, counted_bn = -scores_n[order], times_bn[:, order]
    last = np.searchsorted(ranked, ranked, side="right") - 1  # equal scores have the precision of the last one
    right_bn = counted_bn * y_n[order]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision_bn = np.nan_to_num(right_bn.cumsum(1) / counted_bn.cumsum(1))[:, last]
        return (right_bn * precision_bn).sum(1) / right_bn.sum(1)


def _head_scores(evaluator: Evaluator, test: np.ndarray, subset: str, names: list[str]) -> np.ndarray:
    """Return the fine-tuned head's scores [n, c]. Raise UserError if the head lacks one of the labels."""
    place = {name: number for number, name in enumerate(evaluator.label_names)}
    missing = [name for name in names if name not in place]
    if missing:
        raise UserError(
            f'{evaluator.store.path}: the fine-tuned head has no label "{missing[0]}" (and {len(missing) - 1} more of the '
            "store's): raise --min-positives to what it was fine-tuned with"
        )
    scores_nc = evaluator.label_scores([evaluator.read(index, SUBSETS[subset]) for index in test])
    return scores_nc[:, [place[name] for name in names]]


def _probe(
    x_train_ne: np.ndarray, y_train_nc: np.ndarray, x_test_ne: np.ndarray, regularisation: float
) -> tuple[np.ndarray, int]:
    """Return scores [n, c] of the test samples, and the number of labels whose regression did not converge."""
    scores, unconverged = [], 0
    for y_n in y_train_nc.T:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=_ITERATIONS))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            probe.fit(x_train_ne, y_n)
        unconverged += any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        scores.append(probe.decision_function(x_test_ne))
    return np.stack(scores, axis=1), unconverged
