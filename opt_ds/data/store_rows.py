"""Rows of a store's samples in the columns of the model's modalities."""

from collections.abc import Sequence

import numpy as np

from opt_ds.data.modality import Modality
from opt_ds.store.reader import FeatureStore


def store_rows(store: FeatureStore, samples: np.ndarray, modalities: Sequence[Modality]) -> np.ndarray:
    """Return the rows of samples of a store, int64 [n, modalities]; -1: absent.

    A modality that the store does not have is absent in all its samples.
    """
    columns = columns_of(store, modalities)
    if columns is None:
        return store.rows[samples].astype(np.int64, copy=False)
    rows = np.full((len(samples), len(columns)), -1, np.int64)
    for place, column in enumerate(columns):
        if column >= 0:
            rows[:, place] = store.rows[samples, column]
    return rows


def columns_of(store: FeatureStore, modalities: Sequence[Modality]) -> list[int] | None:
    """Return the column of the store's rows for each modality, -1 if it has none. None: they are the same columns."""
    names = tuple(modality.name for modality in modalities)
    if names == store.modalities:
        return None
    return [store.modalities.index(name) if name in store.modalities else -1 for name in names]


def present_subsets(store: FeatureStore, split: str, modalities: Sequence[Modality]) -> np.ndarray:
    """Return the subsets of the model's modalities that occur in a split, bool [subsets, modalities], distinct."""
    counts = store.split_subsets(split)
    present = np.flatnonzero(counts)[:, None] >> np.arange(len(store.modalities)) & 1 > 0
    columns = columns_of(store, modalities)
    if columns is None:
        return present
    mapped = np.zeros((len(present), len(columns)), bool)
    for place, column in enumerate(columns):
        if column >= 0:
            mapped[:, place] = present[:, column]
    return np.unique(mapped[mapped.any(1)], axis=0)
