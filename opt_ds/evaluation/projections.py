"""Retrieval by a dual projection of the frozen [CLS], fitted on the training split: a first stage, and a control.

As a control it shows what retrieval by the model itself must exceed: how well a linear map of [CLS] ranks the same
candidates, for the trained encoder and for an untrained one.

Legend: q queries, c candidates, k training inputs, e width of [CLS].
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.controls import content_names, untrained
from opt_ds.evaluation.dual_projection import DualProjection, Pairs, fit_dual_projection
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.ranking import log_mean_exp

#: Direction -> (query modalities, target modality).
DIRECTIONS: Mapping[str, tuple[tuple[int, ...], int]] = {
    "image_to_text": ((IMAGE,), TEXT),
    "text_to_image": ((TEXT,), IMAGE),
    "text_to_audio": ((TEXT,), AUDIO),
    "audio_to_text": ((AUDIO,), TEXT),
    "text_audio_to_image": ((TEXT, AUDIO), IMAGE),
}
#: Direction -> the one that it reverses. Both have one projection, because its loss is symmetric.
_REVERSES = {"text_to_image": "image_to_text", "text_to_audio": "audio_to_text"}
#: Number of training inputs whose mean likelihood estimates a text's prior, where texts are ranked. They are the
#: nearest inputs by the projection. Other inputs would contribute little, because nearly all of a text's likelihood
#: comes from the few inputs that it nearly fits.
PRIOR_INPUTS = 32
#: Maximum number of samples per split that a projection is fitted on where it is a control.
FITTED_SAMPLES = 4000
_FEWEST = 2  # pairs to fit a projection on


class Fitted(NamedTuple):
    """A direction's projection and the samples that it was fitted on."""

    projection: DualProjection
    samples: np.ndarray  # int64 [n], of the training split
    query_ne: np.ndarray  # their [CLS], float32 [n, e]


class Scores(NamedTuple):
    """Scores, and the numbers of encoder and decoder passes that they took."""

    values: np.ndarray
    encoder_runs: int
    decoder_runs: int


class Projections:
    """The projections of one model on one store. [CLS] vectors and projections are computed once."""

    def __init__(self, evaluator: Evaluator, seed: int = 1, limit: int | None = None) -> None:
        """Prepare the projections.

        Args:
            evaluator: The model and the store.
            seed: Seed of the initialisation, of the batches and of the choice of samples.
            limit: Maximum number of samples of a split to fit on. None: all.
        """
        self.evaluator, self.seed, self.limit = evaluator, seed, limit
        self._fitted: dict[str, Fitted] = {}
        self._cls: dict[tuple[int, ...], dict[int, np.ndarray]] = {}

    def scores(self, direction: str, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Return the scores [q, c] of samples as queries and of samples as candidates."""
        if direction in _REVERSES:
            return self.scores(_REVERSES[direction], gallery, queries).T
        query, target = DIRECTIONS[direction]
        return self.fitted(direction).projection.scores(self.vectors(queries, query), self.vectors(gallery, (target,)))

    def can_fit(self, direction: str) -> bool:
        """Return whether the training and the validation split have samples to fit a direction on."""
        query, target = DIRECTIONS[direction]
        data = self.evaluator.config.data
        return all(
            split in self.evaluator.store.description.split_names
            and len(self.evaluator.samples_with(split, (*query, target))) >= _FEWEST
            for split in (data.train_split, data.valid_split)
        )

    def fitted(self, direction: str) -> Fitted:
        """Return the projection of a direction that reverses no other one. It is fitted at the first call."""
        if direction not in self._fitted:
            query, target = DIRECTIONS[direction]
            data = self.evaluator.config.data
            fitted_on = []
            for split in (data.train_split, data.valid_split):
                samples = self.evaluator.samples_with(split, (*query, target), self.limit, self.seed)
                if not len(samples):
                    raise UserError(f"{self.evaluator.store.path}: split {split} has no sample to fit {direction} on")
                names = content_names(self.evaluator, samples, target)
                fitted_on.append((samples, Pairs(self.vectors(samples, query), self.vectors(samples, (target,)), names)))
            (train_samples, train), (_, valid) = fitted_on
            projection = fit_dual_projection(train, valid, seed=self.seed)
            self._fitted[direction] = Fitted(projection, train_samples, train.query_ne)
        return self._fitted[direction]

    def vectors(self, samples: np.ndarray, modalities: tuple[int, ...]) -> np.ndarray:
        """Return the [CLS] of these modalities, float32 [samples, e]. Each sample is encoded once."""
        known = self._cls.setdefault(modalities, {})
        new = [int(index) for index in np.unique(samples) if int(index) not in known]
        encoded = self.evaluator.cls_vectors([self.evaluator.read(index, modalities) for index in new])
        known.update(zip(new, encoded, strict=True))
        return np.stack([known[int(index)] for index in samples])

    def nearest_training_inputs(self, direction: str, samples: np.ndarray) -> np.ndarray:
        """Return the training samples whose inputs are nearest to these samples' texts, int64 [k, samples].

        The distance is that of the projection of `direction`, whose target is text. A sample that is itself in the
        training split may be among them.
        """
        fitted = self.fitted(direction)
        scores_nt = fitted.projection.scores(fitted.query_ne, self.vectors(samples, (TEXT,)))
        count = min(PRIOR_INPUTS, len(fitted.samples))
        return fitted.samples[np.sort(np.argpartition(-scores_nt, count - 1, axis=0)[:count], axis=0)]

    def log_priors(self, direction: str, samples: np.ndarray) -> Scores:
        """Return the log prior of these samples' texts, float64 [samples].

        The prior is the mean likelihood over the nearest training inputs. So it does not depend on the queries of an
        evaluation.
        """
        nearest_kt = self.nearest_training_inputs(direction, samples)
        inputs, places = np.unique(nearest_kt, return_inverse=True)
        rows, texts = places.reshape(-1), np.tile(np.arange(len(samples)), len(nearest_kt))
        order = np.argsort(rows, kind="stable")  # grouped by input
        wanted = np.split(texts[order], np.cumsum(np.bincount(rows))[:-1])
        read = [self.evaluator.read(index, DIRECTIONS[direction][0]) for index in inputs]
        found = self.evaluator.text_log_likelihood_of(read, texts_of(self.evaluator, samples), wanted)
        values = np.empty(nearest_kt.size)
        values[order] = np.concatenate(found)
        return Scores(log_mean_exp(values.reshape(nearest_kt.shape), axis=0)[0], len(inputs), nearest_kt.size)


def texts_of(evaluator: Evaluator, samples: np.ndarray) -> list[np.ndarray]:
    """Return the WordPiece ids of these samples' texts."""
    return [evaluator.read(index, (TEXT,)).of(TEXT).ids for index in samples]


class ProjectionControls:
    """Projections of the trained encoder and of an untrained one. Several galleries and splits share them."""

    def __init__(self, evaluator: Evaluator, seed: int = 1, limit: int = FITTED_SAMPLES) -> None:
        """Prepare the projections. Both are fitted on the same samples, from the same initial values."""
        self.trained = Projections(evaluator, seed, limit)
        self.untrained = Projections(untrained(evaluator), seed, limit)

    def can_fit(self, direction: str) -> bool:
        """Return whether there are samples to fit a direction on."""
        return self.trained.can_fit(direction)

    def scores(self, direction: str, gallery: np.ndarray) -> dict[str, np.ndarray]:
        """Return name of the control -> scores [q, c] of a gallery whose samples are both queries and candidates."""
        if not self.can_fit(direction):
            return {}
        return {
            "untrained_projection": self.untrained.scores(direction, gallery, gallery),
            "trained_projection": self.trained.scores(direction, gallery, gallery),
        }
