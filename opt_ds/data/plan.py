"""The plan of pre-training: what each sample of a step is drawn for, and which of its modalities are dropped or replaced.

Draws, drops and donors are hashes of (seed, epoch, store, sample); the order of samples is that of `data.planned`.
"""

from itertools import accumulate

import numpy as np

from opt_ds.config import LOSSES_OF_DRAW, Config
from opt_ds.data.donors import DonorPool
from opt_ds.data.keyed import keyed_choice, keyed_hash, keyed_uniform
from opt_ds.data.matching import CASE_OF_PAIR, NUM_CASES, matching_case
from opt_ds.data.planned import (
    AUDIO,
    DRAWS,
    IMAGE,
    MAM,
    MATCHING,
    MLM,
    MODALITY,
    MVM,
    TEXT,
    VALIDATION_EPOCH,
    Plan,
    PlannedSamples,
)
from opt_ds.store.reader import FeatureStore

_REDRAWS = 32


class StepPlan(Plan):
    """The pre-training tasks, drawn by `tasks.mix`."""

    def __init__(self, config: Config, stores: list[FeatureStore], version: int | None = None) -> None:
        super().__init__(config, stores, version)
        matching = config.tasks.matching
        split = config.data.train_split
        self._train_donors = [DonorPool(store, rows, matching, split) for store, rows in zip(stores, self._train, strict=True)]
        self._has_codes = np.array([store.has_codes for store in stores])
        self.off = self._tasks_off()

    def _training_samples(self, step: int, epoch: np.ndarray, store: np.ndarray, sample: np.ndarray) -> PlannedSamples:
        fraction = step / self.config.schedule.total_steps
        return self._draw(epoch, store, sample, self._train_donors, mix=self.config.tasks.mix_at(fraction))

    def _validation_samples(self, number: int, valid: np.ndarray) -> list[PlannedSamples]:
        parts, store = [], self.stores[number]
        donors = [DonorPool(s, valid if s is store else np.empty(0, np.int64)) for s in self.stores]
        for draw, text_target in ((MLM, None), (MVM, None), (MAM, None), (MODALITY, True), (MODALITY, False), (MATCHING, None)):
            if DRAWS[draw] in self.off:
                continue
            if draw == MODALITY and text_target is False and not self.config.tasks.modality.always_drop_target:
                continue  # without always_drop_target one draw has both targets
            samples = self._draw(
                np.full(len(valid), VALIDATION_EPOCH), np.full(len(valid), number), valid, donors,
                mix={DRAWS[draw]: 1.0}, text_target=text_target,
            )  # fmt: skip
            parts.append(samples)
        return parts

    # ---- what each sample is drawn for

    def _draw(
        self,
        epoch: np.ndarray,
        store: np.ndarray,
        sample: np.ndarray,
        donors: list[DonorPool],
        mix: dict[str, float],
        text_target: bool | None = None,
    ) -> PlannedSamples:
        key = keyed_hash(self.config.seed, "sample", epoch, store, sample)
        source_rows = self._source_rows(store, sample)
        present = source_rows >= 0
        can_write_image = present[:, IMAGE] & self._has_codes[store]
        source_lengths = self._input_lengths(store, source_rows)
        possible = self._possible(present, source_lengths, can_write_image, donors, store, text_target)
        draw = _choose_draw(key, mix, possible)

        input_rows = source_rows.copy()
        targets_text, targets_image = self._drop_modalities(key, draw, input_rows, can_write_image, text_target)
        case = self._match(key, draw, store, sample, input_rows, donors)
        text_target_length, text_ends = self._text_targets(store, source_rows[:, TEXT], source_lengths[:, TEXT], targets_text)
        input_lengths = self._changed_lengths(store, input_rows, source_rows, source_lengths)
        return PlannedSamples(
            epoch=epoch, store=store, sample=sample, draw=draw, source_rows=source_rows, input_rows=input_rows,
            input_lengths=input_lengths, writes_text=targets_text, writes_image=targets_image,
            text_target_length=text_target_length, text_ends=text_ends, case=case,
        )  # fmt: skip

    def _possible(
        self,
        present: np.ndarray,
        lengths: np.ndarray,
        can_write_image: np.ndarray,
        donors: list[DonorPool],
        store: np.ndarray,
        text_target: bool | None,
    ) -> list[np.ndarray]:
        """bool [B] for each of five draws: which samples allow it."""
        num_present = present[:, TEXT].astype(np.int8) + present[:, IMAGE] + present[:, AUDIO]
        active = self.config.tasks.active_losses
        text_ok = present[:, TEXT] & ("dtr" in active) & (text_target is not False)
        image_ok = can_write_image & ("dir" in active) & (text_target is not True)
        if not self.config.tasks.modality.always_drop_target:
            text_ok, image_ok = present[:, TEXT] & ("dtr" in active), can_write_image & ("dir" in active)
        needed = 2 if self.config.tasks.modality.always_drop_target else 1
        has_donors = np.array([pool.usable for pool in donors])[store]
        return [
            lengths[:, TEXT] >= 1,
            lengths[:, IMAGE] >= 1,
            lengths[:, AUDIO] >= 2,  # one frame is masked, one stays
            (text_ok | image_ok) & (num_present >= needed),
            (num_present >= 2) & has_donors,
        ]

    def _drop_modalities(
        self, key: np.ndarray, draw: np.ndarray, rows: np.ndarray, can_write_image: np.ndarray, text_target: bool | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Drop whole modalities of the modality-level samples (in place); say which of them write text, which an image."""
        options, active = self.config.tasks.modality, self.config.tasks.active_losses
        writes_text, writes_image = np.zeros(len(draw), dtype=bool), np.zeros(len(draw), dtype=bool)
        chosen = np.flatnonzero(draw == MODALITY)
        key, new_rows = key[chosen], rows[chosen]
        present = new_rows >= 0
        text_ok = present[:, TEXT] & ("dtr" in active)
        image_ok = can_write_image[chosen] & ("dir" in active)
        dropped = np.zeros_like(present)
        if options.always_drop_target:
            to_text = keyed_uniform(key, "target") < options.text_target_share
            if text_target is not None:
                to_text = np.full(len(chosen), text_target)
            to_text = text_ok & (to_text | ~image_ok)
            dropped[:, TEXT] = to_text
            dropped[:, IMAGE] = ~to_text & image_ok
        always = dropped.copy()
        waiting = np.arange(len(chosen))
        for attempt in range(_REDRAWS):  # redrawn when all would go; 0.3^3 of them a time
            if not waiting.size:
                break
            chance = keyed_uniform(key[waiting, None], "drop", attempt, np.arange(3)[None, :]) < options.drop_probability
            dropped[waiting] = (chance | always[waiting]) & present[waiting]
            waiting = waiting[(present[waiting] & ~dropped[waiting]).sum(1) == 0]
        dropped[waiting] = always[waiting]
        new_rows[dropped] = -1
        rows[chosen] = new_rows
        writes_text[chosen] = text_ok & (dropped[:, TEXT] if options.always_drop_target else True)
        writes_image[chosen] = image_ok & (dropped[:, IMAGE] if options.always_drop_target else True)
        return writes_text, writes_image

    def _match(
        self, key: np.ndarray, draw: np.ndarray, store: np.ndarray, sample: np.ndarray, rows: np.ndarray, donors: list[DonorPool]
    ) -> np.ndarray:
        """Replace and drop inputs of the sample-level samples (in place); give each its matching case, -1 elsewhere."""
        case = np.full(len(draw), -1, dtype=np.int8)
        chosen = np.flatnonzero(draw == MATCHING)
        if not chosen.size:
            return case
        key, present = key[chosen], rows[chosen] >= 0
        drawn_case = keyed_choice(NUM_CASES, key, "case")
        kept = keyed_choice(3, key, "kept")  # the modality that stays its own in the case "none"
        replaced = matching_case(drawn_case, kept)
        complete = present.all(1)
        judged_as_pair = ~complete | (keyed_uniform(key, "pair") < self.config.tasks.matching.pair_probability)
        absent = np.where(complete, keyed_choice(3, key, "absent"), np.argmin(present, axis=1))
        pair_case = CASE_OF_PAIR[absent]
        replaced[judged_as_pair, absent[judged_as_pair]] = False
        pair_matches = ~replaced.any(1)
        case[chosen] = np.where(judged_as_pair, np.where(pair_matches, pair_case, NUM_CASES - 1), drawn_case)
        new_rows = rows[chosen]
        new_rows[judged_as_pair, absent[judged_as_pair]] = -1
        sample, store = sample[chosen], store[chosen]
        for number, pool in enumerate(donors):
            own = self._of_store(store, number)
            if sample[own].size:
                new_rows[own] = pool.replace(new_rows[own], replaced[own], sample[own], key[own])
        rows[chosen] = new_rows
        return case

    # ---- facts of the stores

    def _tasks_off(self) -> dict[str, str]:
        """Draw -> why no sample of these stores can take it, or why the config has none of it."""
        subsets = sum(store.split_subsets(self.config.data.train_split) for store in self.stores)
        present = np.flatnonzero(subsets)[:, None] >> np.arange(3) & 1 > 0  # a row for each subset of modalities that occurs
        everywhere = {MLM: "text", MVM: "image", MAM: "audio"}
        active, trained = self.config.tasks.active_losses, self.config.tasks.trained_losses
        off = {}
        for number, draw in enumerate(LOSSES_OF_DRAW):
            if not any(loss in active for loss in LOSSES_OF_DRAW[draw]):
                off[draw] = "its weight is 0"
            elif not any(loss in trained for loss in LOSSES_OF_DRAW[draw]):
                off[draw] = "its share of tasks.mix is 0"
            elif number in everywhere and not present[:, number].any():
                off[draw] = f"no sample has {everywhere[number]}"
            elif number == MATCHING and not any(pool.usable for pool in self._train_donors):
                off[draw] = "no donor: it needs two modalities, and in a split three groups that do not share a file"
        needed = 2 if self.config.tasks.modality.always_drop_target else 1
        text_ok = present[:, TEXT].any() and "dtr" in active
        image_ok = present[:, IMAGE].any() and "dir" in active and self._has_codes.any()
        if not (text_ok or image_ok) or not (present.sum(1) >= needed).any():
            off.setdefault("modality", "no sample has a modality to write and one to write it from")
        if not present[:, TEXT].any() and "dtr" in active:
            off["dtr"] = "no sample has text"
        if not self._has_codes.any() and "dir" in active:
            off["dir"] = "no store has image codes (opt-ds train-dvae writes them)"
        return off


def _choose_draw(key: np.ndarray, mix: dict[str, float], possible: list[np.ndarray]) -> np.ndarray:
    """int8 [B]: a draw with the mix's shares among the possible ones (an impossible one's share goes to the others)."""
    shares = [mix.get(draw, 0.0) * allowed for draw, allowed in zip(LOSSES_OF_DRAW, possible, strict=True)]
    cumulative = list(accumulate(shares))
    total = cumulative[-1]
    place = keyed_uniform(key, "draw") * total
    drawn = np.zeros(len(key), dtype=np.int8)
    for upper in cumulative:
        drawn += place >= upper
    drawn[total <= 0] = -1
    return drawn
