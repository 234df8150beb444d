"""The plan of fine-tuning: what a sample's inputs are, and whether it writes its text, gives its labels or is judged.

Nothing is masked. A sample whose modalities allow several of `finetune.inputs` draws one of them anew in each epoch. All is a
function of hashes of (seed, epoch, store, sample); the order of samples is that of `data.planned`.

Legend: B samples of a step, S input subsets.
"""

from functools import partial
from typing import Any

import numpy as np

from opt_ds.config import Config, FineTuneConfig
from opt_ds.data.derived import cached_array
from opt_ds.data.keyed import keyed_choice, keyed_hash, keyed_uniform
from opt_ds.data.matching import CASE_OF_PAIR
from opt_ds.data.near_donors import NearDonors
from opt_ds.data.plan import StepPlan
from opt_ds.data.planned import (
    LABELS,
    MATCHING,
    MODALITIES,
    SUBSETS,
    TEXT,
    VALIDATION_EPOCH,
    WRITE,
    Plan,
    PlannedSamples,
)
from opt_ds.errors import UserError
from opt_ds.store.reader import FeatureStore

_DRAW_OF_TASK = {"retrieval": MATCHING, "transcription": WRITE, "captioning": WRITE, "classification": LABELS, "vqa": LABELS}
_OWN = -1  # no modality is a donor's


class FineTunePlan(Plan):
    """One task of fine-tuning; its samples are those that have all modalities of one of the input subsets, and a target."""

    def __init__(self, config: Config, stores: list[FeatureStore], version: int | None = None) -> None:
        assert config.finetune is not None, "the plan of a pre-training run is StepPlan"
        self.options: FineTuneConfig = config.finetune
        self._draw = _DRAW_OF_TASK[self.options.task]
        self._input_sm = np.array([[m in SUBSETS[name] for m in MODALITIES] for name in self.options.inputs])
        super().__init__(config, stores, version)
        if not self.num_samples:
            target = {WRITE: " and text to write", LABELS: " and labels", MATCHING: ""}[self._draw]
            raise UserError(
                f'{stores[0].path}: no sample of split "{config.data.train_split}" has {" or ".join(self.options.inputs)}'
                f"{target}: choose other --inputs, or another store"
            )
        self.off: dict[str, str] = {}
        self._donors = self._near_donors(config.data.train_split)
        self._valid_donors = self._near_donors(config.data.valid_split)

    def _near_donors(self, split: str) -> list[NearDonors]:
        if self._draw != MATCHING:
            return []
        options = self.options
        return [
            NearDonors(
                store, self._usable(store, split), options.donor_candidates, options.same_group_donors, self._rows_key(split)
            )
            for store in self.stores
        ]

    def _rows_key(self, split: str) -> list[Any]:
        return [split, self._draw, self._input_sm.tolist()]

    def _usable(self, store: FeatureStore, split: str) -> np.ndarray:
        return cached_array(store, "usable", self._rows_key(split), partial(self._find_usable, store, split))

    def _find_usable(self, store: FeatureStore, split: str) -> np.ndarray:
        samples = store.split_samples(split)
        has_target = np.ones(len(samples), dtype=bool)
        if self._draw == WRITE:
            has_target = store.rows[samples, TEXT] >= 0
        elif self._draw == LABELS:
            has_target = np.array([bool(store.labels(int(index))) for index in samples], dtype=bool)
        return samples[has_target & self._possible(store.rows[samples]).any(1)]

    def _possible(self, rows: np.ndarray) -> np.ndarray:
        """bool [B, S]: the samples of these rows have all modalities of the subset."""
        return np.logical_not((self._input_sm[None] & (rows < 0)[:, None]).any(2))

    def _training_samples(self, step: int, epoch: np.ndarray, store: np.ndarray, sample: np.ndarray) -> PlannedSamples:
        key = keyed_hash(self.config.seed, "finetune", epoch, store, sample)
        possible = self._possible(self._source_rows(store, sample))
        place = keyed_choice(possible.sum(1), key, "inputs")  # of the possible subsets
        chosen = np.argmax(possible & (np.cumsum(possible, axis=1) == place[:, None] + 1), axis=1)
        replaced = np.full(len(sample), _OWN)
        if self._draw == MATCHING:
            order = np.argsort(keyed_hash(key[:, None], "side", np.arange(3)[None]), axis=1)  # which modality a donor gives
            ranked = np.where(np.take_along_axis(self._input_sm[chosen], order, axis=1), np.arange(3)[None], 3)
            side = np.take_along_axis(order, ranked.argmin(1)[:, None], axis=1)[:, 0]
            replaced = np.where(keyed_uniform(key, "negative") < self.options.negative_share, side, _OWN)
        return self._planned(key, epoch, store, sample, chosen, replaced, self._donors)

    def _validation_samples(self, number: int, valid: np.ndarray) -> list[PlannedSamples]:
        parts = []
        for subset, inputs in enumerate(self._input_sm):
            sides = [_OWN, *np.flatnonzero(inputs)] if self._draw == MATCHING else [_OWN]
            fitting = valid[self._possible(self.stores[number].rows[valid])[:, subset]]
            epoch, store = np.full(len(fitting), VALIDATION_EPOCH), np.full(len(fitting), number)
            for side in sides:
                key = keyed_hash(self.config.seed, "finetune", epoch, store, fitting, subset, int(side) + 1)
                chosen, replaced = np.full(len(fitting), subset), np.full(len(fitting), side)
                parts.append(self._planned(key, epoch, store, fitting, chosen, replaced, self._valid_donors))
        return parts

    def _planned(
        self,
        key: np.ndarray,
        epoch: np.ndarray,
        store: np.ndarray,
        sample: np.ndarray,
        chosen: np.ndarray,
        replaced: np.ndarray,
        donors: list[NearDonors],
    ) -> PlannedSamples:
        """Samples with the inputs of subset `chosen` [B], of which modality `replaced` [B] comes from a donor (−1: none)."""
        source_rows = self._source_rows(store, sample)
        input_rows = np.where(self._input_sm[chosen], source_rows, -1)
        draw = np.full(len(sample), self._draw, dtype=np.int8)
        case = np.full(len(sample), -1, dtype=np.int8)
        if self._draw == MATCHING:
            for number, pool in enumerate(donors):
                own = store == number
                input_rows[own], found = pool.replace(input_rows[own], replaced[own], sample[own], key[own])
                draw[own] = np.where(found, MATCHING, -1)
            case = np.where(draw == MATCHING, _case(self._input_sm[chosen], replaced), -1).astype(np.int8)
        writes_text = draw == WRITE
        source_text = source_rows[:, TEXT]
        text_length, text_ends = self._text_targets(store, source_text, self._lengths_of(store, source_text, TEXT), writes_text)
        return PlannedSamples(
            epoch=epoch, store=store, sample=sample, draw=draw, source_rows=source_rows, input_rows=input_rows,
            input_lengths=self._input_lengths(store, input_rows), writes_text=writes_text,
            writes_image=np.zeros(len(sample), dtype=bool), text_target_length=text_length, text_ends=text_ends, case=case,
        )  # fmt: skip


def _case(given: np.ndarray, replaced: np.ndarray) -> np.ndarray:
    """Matching case (see `data.matching`) of inputs [B, 3] of which modality `replaced` is a donor's."""
    complete = given.all(1)
    pair = CASE_OF_PAIR[np.argmin(given, axis=1)]
    matching = np.where(complete, 0, pair)
    return np.where(replaced < 0, matching, np.where(complete, replaced + 1, 4))


def plan_class(config: Config) -> type[Plan]:
    """The plan that the run follows."""
    return StepPlan if config.finetune is None else FineTunePlan


def make_plan(config: Config, stores: list[FeatureStore], version: int | None = None) -> Plan:
    """The plan of a run, of the version that it began with (None: the newest).

    Raises UserError when the stores have no sample for fine-tuning's task.
    """
    return plan_class(config)(config, stores, version)
