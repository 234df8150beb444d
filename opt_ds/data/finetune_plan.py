"""Step plan of fine-tuning: one task, and the input modalities of each sample.

Nothing is masked. A sample whose modalities allow several of `finetune.inputs` gets one of them, chosen again in each
epoch. All choices are functions of hashes of (seed, epoch, store, sample). The order of samples is that of
`data.step_plan`.

Legend: B samples of a step, S input subsets, M modalities of the model.
"""

from functools import partial
from typing import Any

import numpy as np

from opt_ds.config import Config, FineTuneConfig
from opt_ds.data.derived import cached_array
from opt_ds.data.modalities import SUBSETS
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.step_plan import Plan
from opt_ds.data.step_samples import VALIDATION_EPOCH, StepSamples
from opt_ds.data.store_rows import store_rows
from opt_ds.data.task import DataTask
from opt_ds.errors import UserError
from opt_ds.ops.keyed import keyed_choice, keyed_hash
from opt_ds.store.reader import FeatureStore


class FineTunePlan(Plan):
    """Step plan of one fine-tuning task.

    Its samples have a target and all modalities of at least one input subset.
    """

    def __init__(self, config: Config, stores: list[FeatureStore], version: int | None = None) -> None:
        assert config.finetune is not None, "the plan of a pre-training run is PretrainingPlan"
        self.options: FineTuneConfig = config.finetune
        units = list(config.tasks.units.values())
        self._number = next(i for i, unit in enumerate(units) if self.options.task in unit.fine_tunes)
        self._task: DataTask = units[self._number](config)
        number_of_modalities = len(config.model.modalities)
        self._input_sm = np.array([[m in SUBSETS[name] for m in range(number_of_modalities)] for name in self.options.inputs])
        super().__init__(config, stores, version)
        if not self.num_samples:
            raise UserError(
                f'{stores[0].path}: no sample of split "{config.data.train_split}" has {" or ".join(self.options.inputs)}'
                f"{self._task.target_words}: choose other --inputs, or another store"
            )
        self.disabled_tasks: dict[str, str] = {}
        self._derived, self._valid_derived = (self._derive(split) for split in (config.data.train_split, config.data.valid_split))

    def _derive(self, split: str) -> Any:
        usable = [self._usable(store, split) for store in self.stores]
        return self._task.derive_for_finetuning(self.stores, usable, self._rows_key(split))

    def _rows_key(self, split: str) -> list[Any]:
        return [split, self._task.name, self._input_sm.tolist()]

    def _usable(self, store: FeatureStore, split: str) -> np.ndarray:
        return cached_array(store, "usable", self._rows_key(split), partial(self._find_usable, store, split))

    def _find_usable(self, store: FeatureStore, split: str) -> np.ndarray:
        samples = store.split_samples(split)
        return samples[self._task.has_target(store, samples) & self._possible(store_rows(store, samples, self.modalities)).any(1)]

    def _possible(self, rows: np.ndarray) -> np.ndarray:
        """Return whether the samples of these rows have all modalities of each subset, bool [B, S]."""
        return np.logical_not((self._input_sm[None] & (rows < 0)[:, None]).any(2))

    def _training_samples(self, step: int, epoch: np.ndarray, store: np.ndarray, sample: np.ndarray) -> StepSamples:
        key = keyed_hash(self.config.seed, "finetune", epoch, store, sample)
        possible = self._possible(self._source_rows(store, sample))
        place = keyed_choice(possible.sum(1), key, "inputs")  # index among the possible subsets
        chosen = np.argmax(possible & (np.cumsum(possible, axis=1) == place[:, None] + 1), axis=1)
        replaced = self._task.chosen_replacement(key, self._input_sm[chosen])
        return self._assigned(key, epoch, store, sample, chosen, replaced, self._derived)

    def _validation_samples(self, number: int, valid: np.ndarray) -> list[StepSamples]:
        parts = []
        for subset, inputs in enumerate(self._input_sm):
            fitting = valid[self._possible(store_rows(self.stores[number], valid, self.modalities))[:, subset]]
            epoch, store = np.full(len(fitting), VALIDATION_EPOCH), np.full(len(fitting), number)
            for side in self._task.replacements(inputs):
                key = keyed_hash(self.config.seed, "finetune", epoch, store, fitting, subset, int(side) + 1)
                chosen, replaced = np.full(len(fitting), subset), np.full(len(fitting), side)
                parts.append(self._assigned(key, epoch, store, fitting, chosen, replaced, self._valid_derived))
        return parts

    def _assigned(
        self,
        key: np.ndarray,
        epoch: np.ndarray,
        store: np.ndarray,
        sample: np.ndarray,
        chosen: np.ndarray,
        replaced: np.ndarray,
        derived: Any,
    ) -> StepSamples:
        """Return samples with the inputs of subset `chosen` [B].

        Modality `replaced` [B] comes from another sample (−1: none).
        """
        candidates = self._candidates(key, epoch, store, sample, variant=-1)
        inputs = self._input_sm[chosen]
        task = np.full(len(sample), self._number, dtype=np.int8)
        sampled = self._sampled(task, np.where(inputs, candidates.source_rows, -1))
        self._task.assign_for_finetuning(candidates, sampled, inputs, replaced, derived)
        return self._samples_of(candidates, sampled)


def plan_class(config: Config) -> type[Plan]:
    """Return the class of the run's step plan."""
    return PretrainingPlan if config.finetune is None else FineTunePlan


def make_plan(config: Config, stores: list[FeatureStore], version: int | None = None) -> Plan:
    """Return the run's step plan, in the version that the run began with (None: the newest).

    Raise UserError if the stores have no sample for the fine-tuning task.
    """
    return plan_class(config)(config, stores, version)
