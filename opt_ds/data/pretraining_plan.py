"""Step plan of pre-training: the task of each sample, and which of its modalities are dropped or replaced.

Tasks, dropping and replacing are hashes of (seed, epoch, store, sample). The order of samples is that of
`data.step_plan`.
"""

from itertools import accumulate
from typing import Any

import numpy as np

from opt_ds.config import Config
from opt_ds.data.step_plan import Plan
from opt_ds.data.step_samples import GROUP, VALIDATION_EPOCH, StepSamples
from opt_ds.data.store_rows import present_subsets
from opt_ds.data.task import Candidates
from opt_ds.ops.keyed import keyed_hash, keyed_uniform
from opt_ds.store.reader import FeatureStore


class PretrainingPlan(Plan):
    """Step plan of the pre-training tasks, which are sampled by `tasks.sampling_weights`."""

    def __init__(self, config: Config, stores: list[FeatureStore], version: int | None = None) -> None:
        super().__init__(config, stores, version)
        self._derived = {
            name: task.derive(stores, self._train, config.data.train_split)
            for name, task in self.tasks.items()
            if task.sampled and task.is_configured
        }
        self.disabled_tasks = self._disabled()

    def _training_samples(self, step: int, epoch: np.ndarray, store: np.ndarray, sample: np.ndarray) -> StepSamples:
        fraction = step / self.config.schedule.total_steps
        return self._assigned(epoch, store, sample, self.config.tasks.sampling_weights_at(fraction), self._derived)

    def _validation_samples(self, number: int, valid: np.ndarray) -> list[StepSamples]:
        samples_of = [valid if number == other else valid[:0] for other in range(len(self.stores))]
        epoch, store = np.full(len(valid), VALIDATION_EPOCH), np.full(len(valid), number)
        parts = []
        for name in self._derived:
            if name in self.disabled_tasks:
                continue
            derived = {name: self.tasks[name].derive(self.stores, samples_of, None)}
            for variant in range(self.tasks[name].num_variants):
                parts.append(self._assigned(epoch, store, valid, {name: 1.0}, derived, variant))
        return parts

    def _assigned(
        self,
        epoch: np.ndarray,
        store: np.ndarray,
        sample: np.ndarray,
        sampling_weights: dict[str, float],
        derived: dict[str, Any],
        variant: int = -1,
    ) -> StepSamples:
        key = keyed_hash(self.config.seed, "sample", epoch, store, sample)
        candidates = self._candidates(key, epoch, store, sample, variant)
        weights = [
            sampling_weights.get(name, 0.0) * self.tasks[name].possible(candidates, derived[name])
            if sampling_weights.get(name)
            else np.zeros(len(key))
            for name in self._derived
        ]
        candidates, task, group = self._with_copies(candidates, self._chosen_task(key, weights))
        sampled = self._sampled(task, candidates.source_rows.copy())
        if group is not None:
            sampled.columns[GROUP] = group
        for number, (name, unit) in enumerate(self.tasks.items()):
            own = np.flatnonzero(sampled.task == number)
            if own.size:
                unit.assign(candidates, sampled, own, derived[name])
        return self._samples_of(candidates, sampled)

    def _with_copies(
        self, candidates: Candidates, task: np.ndarray
    ) -> tuple[Candidates, np.ndarray, np.ndarray | None]:
        """Append the copies of the samples whose task compares several inputs.

        Return the candidates, the task of each, int8 [B], and their groups, int64 [B] (see `GROUP`). None: no task has
        copies.
        """
        if not any(unit.most_copies for unit in self.tasks.values()):
            return candidates, task, None
        copies, grouped = np.zeros(len(task), np.int64), np.zeros(len(task), bool)
        for number, unit in enumerate(self.tasks.values()):
            own = np.flatnonzero(task == number)
            if own.size and unit.most_copies:
                copies[own], grouped[own] = unit.num_copies(candidates, own), unit.copies_share_batch
        candidates, index = candidates.with_copies(copies)
        # The key identifies the sample in all stores, epochs and chunks of the validation pass.
        group = np.where((copies > 0)[index] & grouped[index], (candidates.key >> np.uint64(1)).astype(np.int64), -1)
        return candidates, task[index], group

    def _chosen_task(self, key: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
        """Return a task per sample, int8 [B], sampled by weight among the possible ones.

        Weights of impossible tasks go to the others.
        """
        cumulative = list(accumulate(weights))
        total = cumulative[-1]
        place = keyed_uniform(key, "draw") * total
        chosen = np.zeros(len(key), dtype=np.int8)
        for upper in cumulative:
            chosen += place >= upper
        numbers = np.array([self.task_names.index(name) for name in self._derived] + [-1], dtype=np.int8)
        return np.where(total > 0, numbers[chosen], np.int8(-1))

    def _disabled(self) -> dict[str, str]:
        """Return task or loss -> why no sample of these stores can take it, or why the configuration disables it."""
        split = self.config.data.train_split
        # One row per subset of modalities that occurs.
        present = np.concatenate([present_subsets(store, split, self.modalities) for store in self.stores])
        active, sampled = self.config.tasks.active_losses, self.config.tasks.sampled_losses
        tasks: dict[str, str] = {}
        losses: dict[str, str] = {}
        for name, derived in self._derived.items():
            names = self.tasks[name].loss_names()
            if not any(loss in active for loss in names):
                tasks[name] = "its weight is 0"
            elif not any(loss in sampled for loss in names):
                tasks[name] = "its weight in tasks.sampling_weights is 0"
            for key, reason in self.tasks[name].disabled(present, self.stores, derived).items():
                (tasks if key == name else losses).setdefault(key, reason)
        return tasks | losses
