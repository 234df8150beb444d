"""Sample reader: reads the rows of a sample of a step plan from the store, masks its items and sets its targets."""

from collections.abc import Iterable

import numpy as np

from opt_ds.config import Config
from opt_ds.data.modality import modalities_of
from opt_ds.data.sample import Sample
from opt_ds.data.step_samples import VALIDATION_EPOCH, StepSamples
from opt_ds.data.store_rows import store_rows
from opt_ds.data.task import tasks_of
from opt_ds.ops.keyed import keyed_hash
from opt_ds.store.reader import FeatureStore


class SampleReader:
    """Reads `Sample`s of a step plan. It holds the stores and the keys, and no state."""

    def __init__(self, config: Config, stores: list[FeatureStore]) -> None:
        self.config, self.stores = config, stores
        self.modalities = modalities_of(config.model)
        self._tasks = list(tasks_of(config).values())
        self._spans = {modality: span for task in self._tasks for modality, span in task.mask_spans.items()}

    def read(self, samples: StepSamples, index: int) -> Sample:
        """Return the sample with this global sample index, masked by its key, with the targets of its task."""
        number, rows = int(samples.store[index]), samples.input_rows[index]
        store = self.stores[number]
        task = self._tasks[samples.task[index]] if samples.task[index] >= 0 else None
        epoch = int(samples.epoch[index])
        key = int(keyed_hash(self.config.seed, "masks", epoch, number, int(samples.sample[index])))
        training_key = key if epoch < VALIDATION_EPOCH else None
        sample = Sample(name=f"{store.name}/{store.sample_id(int(samples.sample[index]))}", index=index)
        for modality, row in zip(self.modalities, rows, strict=True):
            if row < 0:
                continue
            items = modality.read(store, row, self.config.data, training_key)
            if task and modality.number in task.masked_modalities:
                span = self._spans.get(modality.number, 1)
                modality.mask(items, store, self.config.tasks.mask_probability, span, key)
            sample.items[modality.number] = items
        if task:
            task.add_targets(sample, samples, index, store)
        return sample

    def read_ahead(self, samples: StepSamples, indices: np.ndarray) -> int:
        """Start reading the features of these samples from disk, without waiting. Return their number of bytes."""
        total = 0
        with_features = [modality for modality in self.modalities if modality.standardizer]
        for number, rows in zip(samples.store[indices].tolist(), samples.input_rows[indices].tolist(), strict=True):
            store = self.stores[number]
            for modality in with_features:
                row = rows[modality.number]
                total += store.read_ahead(modality.name, row) if row >= 0 else 0
        return total

    def read_unmasked(self, number: int, index: int, modalities: Iterable[int] | None = None) -> Sample:
        """Return a store's sample without masking, for evaluation.

        Args:
            number: Index of the store.
            index: Sample index in the store.
            modalities: The modalities that are read if the sample has them. None: all.
        """
        store = self.stores[number]
        sample = Sample(name=f"{store.name}/{store.sample_id(index)}")
        rows = store_rows(store, np.array([index]), self.modalities)[0]
        for modality in self.modalities if modalities is None else (self.modalities[m] for m in modalities):
            if rows[modality.number] >= 0:
                sample.items[modality.number] = modality.read(store, rows[modality.number])
        return sample
