"""Controls: another sample's input, and an untrained encoder.

A figure that another sample's input reaches too does not depend on the input. A figure that an untrained encoder with the
same probe or projection reaches says nothing about pre-training.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.evaluation.evaluator import Evaluator, seeded_choice
from opt_ds.modalities import BUILT_IN
from opt_ds.model.initial import initial_model
from opt_ds.store.same_content import Groups, image_content, plain_caption

NO_OTHER = "no sample has another one's input: all belong to one group or have the same content"


class Others(NamedTuple):
    """For some samples, the other sample whose input they get in a control.

    Attributes:
        places: Indices of the samples that have one, ascending, int64 [n].
        others: Indices of the other samples, int64 [n], without repetition.
    """

    places: np.ndarray
    others: np.ndarray

    def limited(self, limit: int, seed: int) -> "Others":
        """Return at most `limit` of them, a seeded choice."""
        kept = seeded_choice(np.arange(len(self.places)), limit, seed)
        return Others(self.places[kept], self.others[kept])


def other_samples(evaluator: Evaluator, samples: np.ndarray, modalities: Sequence[int], seed: int) -> Others:
    """Assign each sample another one, which shares neither group nor caption nor the content of a modality with it.

    Samples that share something, directly or through others, form a class. The samples are sorted by class and turned by
    at least the size of the largest class, so that every sample gets one of another class. If that class is more than
    half of the samples, some have no other one.

    Args:
        evaluator: The model and the store.
        samples: Sample indices, int64 [n].
        modalities: The modalities whose content is compared, besides captions.
        seed: Seed of the choice.
    """
    classes = _classes(evaluator, samples, sorted({*modalities} - {TEXT}))
    return derangement(classes, seed)


def other_inputs(
    evaluator: Evaluator, samples: np.ndarray, modality: int, strata: np.ndarray, seed: int
) -> Others:
    """Assign each sample another one of its stratum whose content of one modality is another one.

    Unlike in `other_samples`, the two may share the other modalities: many questions are asked of several images, and all
    questions of an image have that image.

    Args:
        evaluator: The model and the store.
        samples: Sample indices, int64 [n].
        modality: The modality whose content is compared. Images and audio of one group are taken for the same.
        strata: Stratum of each sample, int64 [n].
        seed: Seed of the choice.
    """
    keys: list[list]
    if modality == TEXT:
        keys = [[plain_caption(evaluator.caption(index)) for index in samples]]
    else:
        keys = [evaluator.store.groups[samples].tolist(), content_names(evaluator, samples, modality).tolist()]
    classes, places, others = _joined(keys, len(samples)), [], []
    for stratum in np.unique(strata):
        own = np.flatnonzero(strata == stratum)
        found = derangement(classes[own], seed)
        places.append(own[found.places])
        others.append(own[found.others])
    order = np.argsort(np.concatenate(places)) if places else np.empty(0, np.int64)
    return Others(*(np.concatenate(part)[order] if part else order for part in (places, others)))


def derangement(classes: np.ndarray, seed: int) -> Others:
    """Assign each of n items another one of another class (see `other_samples`). `classes` is int64 [n]."""
    count, random = len(classes), np.random.default_rng(seed)
    if not count:
        return Others(np.empty(0, np.int64), np.empty(0, np.int64))
    names, members = np.unique(classes, return_inverse=True)
    largest = int(np.bincount(members).max())
    order = np.lexsort((random.random(count), random.permutation(len(names))[members]))
    least = min(largest, count - 1)
    turned = np.roll(order, -int(random.integers(least, max(least, count - largest) + 1)))
    others = np.empty(count, dtype=np.int64)
    others[order] = turned
    places = np.flatnonzero(classes[others] != classes)
    return Others(places, others[places])


def _classes(evaluator: Evaluator, samples: np.ndarray, modalities: Sequence[int]) -> np.ndarray:
    """Return which samples share group, caption or content, directly or through others: int64 [n], equal if so."""
    keys: list[list] = [evaluator.store.groups[samples].tolist()]
    if (evaluator.store.rows[samples, TEXT] >= 0).all():
        keys.append([plain_caption(evaluator.caption(index)) for index in samples])
    keys += [content_names(evaluator, samples, modality).tolist() for modality in modalities]
    return _joined(keys, len(samples))


def _joined(keys: Sequence[list], count: int) -> np.ndarray:
    """Return which of `count` samples are equal in one of the keys, directly or through others: int64 [count]."""
    joined = Groups(count)
    for own in keys:
        first: dict = {}
        for place, key in enumerate(own):
            joined.join(first.setdefault(key, place), place)
    return joined.names()


def content_names(evaluator: Evaluator, samples: np.ndarray, modality: int) -> np.ndarray:
    """Return int64 [n] identifiers that are equal if and only if two samples' captions, images or audio are equal."""
    content: list[str] | list[bytes]
    if modality == TEXT:
        content = [evaluator.caption(index) for index in samples]
    else:
        store, rows = evaluator.store, evaluator.store.rows[samples, modality]
        content = [
            image_content(store.region_features(row)) if modality == IMAGE else store.frames(row).tobytes() for row in rows
        ]
    return np.unique(np.array([hash(item) for item in content]), return_inverse=True)[1]


def with_others(
    evaluator: Evaluator, samples: np.ndarray, modalities: Sequence[int], replaced: int, others: Others
) -> list[Sample]:
    """Return the inputs of `others.places`, with one modality replaced by that of the other sample.

    Args:
        evaluator: The model and the store.
        samples: Sample indices, int64 [n].
        modalities: Modalities of the input.
        replaced: The modality of the input that comes from the other sample.
        others: Which samples, and their others.
    """
    found = []
    for place, other in zip(others.places, others.others, strict=True):
        sample = evaluator.read(samples[place], modalities)
        sample.items[replaced] = evaluator.read(samples[other], (replaced,)).of(replaced)
        found.append(sample)
    return found


def another(modality: int) -> str:
    """Return the name of the control in which this modality is another sample's."""
    return f"another_{tuple(BUILT_IN)[modality]}"


def untrained(evaluator: Evaluator) -> Evaluator:
    """Return an evaluator of the same architecture with random weights: those of the run's seed, before its first step.

    They are without those of `model.bert`.
    """
    with torch.random.fork_rng(devices=[]):
        model = initial_model(evaluator.config, [evaluator.store], warm_start=False)
    return Evaluator(model.to(evaluator.device), evaluator.config, evaluator.store, evaluator.device, evaluator.group)
