"""The step plan: which samples a step takes, what each is drawn for, what is dropped or replaced, and who computes it.

A step is a pure function of (config, stores, step): position p = step·B + i, epoch = p div N, sample = a keyed permutation of
(p mod N). Every rank computes the whole step's plan, so the counts that normalise the losses need no communication.
What a single sample's masks are is decided later, by `data.samples`, from the same keys.

B: samples of a step; MODALITIES are columns 0 text, 1 image, 2 audio everywhere.
"""

from dataclasses import dataclass

import numpy as np

from opt_ds.config import LOSSES_OF_DRAW, Config
from opt_ds.data.donors import DonorPool
from opt_ds.data.keyed import keyed_choice, keyed_hash, keyed_uniform, permute
from opt_ds.data.lengths import model_lengths
from opt_ds.data.masking import num_masked, num_masked_frames
from opt_ds.data.matching import CASE_OF_PAIR, NUM_CASES, matching_case
from opt_ds.data.micro_batches import MicroBatchPlan, distribute
from opt_ds.store.reader import FeatureStore

TEXT, IMAGE, AUDIO = MODALITIES = (0, 1, 2)
DRAWS = tuple(LOSSES_OF_DRAW)
MLM, MVM, MAM, MODALITY, MATCHING = range(5)
VALIDATION_EPOCH = 2**40  # no training run gets there, so its hashes are its own
_MIX_BLOCK = 4096  # positions in which several weighted stores take exactly their shares
_REDRAWS = 32


@dataclass(frozen=True)
class PlannedSamples:
    """A step's samples as arrays of length B. Rows are global rows of the sample's store; -1: not there."""

    epoch: np.ndarray  # int64
    store: np.ndarray  # int64, index into the run's stores
    sample: np.ndarray  # int64, index into the store
    draw: np.ndarray  # int8, index into DRAWS; -1: nothing can be learned from this sample
    source_rows: np.ndarray  # int64 [B, 3], the sample's own
    input_rows: np.ndarray  # int64 [B, 3], after dropping and donors
    input_lengths: np.ndarray  # int64 [B, 3], items after truncation and stacking
    writes_text: np.ndarray  # bool, the text decoder reconstructs
    writes_image: np.ndarray  # bool, the image decoder reconstructs
    text_target_length: np.ndarray  # int64, WordPieces of the reconstructed text (without [SEP])
    case: np.ndarray  # int8, matching case (see data.matching); -1: not judged

    def __len__(self) -> int:
        return len(self.draw)

    def masked(self, modality: int) -> np.ndarray:
        """bool [B]: items of this input modality are masked."""
        return (self.draw == (MLM, MVM, MAM)[modality]) | ((self.draw == MODALITY) & (self.input_rows[:, modality] >= 0))


@dataclass(frozen=True)
class PlannedStep:
    """One optimiser step: its samples, the losses' counts over the whole global batch, and each rank's micro-batches."""

    step: int
    samples: PlannedSamples
    counts: dict[str, float]
    micro_batches: list[list[MicroBatchPlan]]  # [rank][k], equally many on every rank
    num_tokens: int
    fill: float  # positions used, as a share of the micro-batches' budget
    balance: float  # the most loaded rank's positions over the mean rank's

    @property
    def num_samples(self) -> int:
        return len(self.samples)


class StepPlan:
    """Plans every step of a run over the train split, and the fixed validation pass over the valid split."""

    VERSION = 1  # part of a checkpoint: a plan that draws otherwise must not continue an older run

    def __init__(self, config: Config, stores: list[FeatureStore]) -> None:
        self.config, self.stores = config, stores
        self._train = [store.split_samples(config.data.train_split) for store in stores]
        self._lengths = [model_lengths(config.model, store) for store in stores]
        self._train_donors = [DonorPool(store, rows) for store, rows in zip(stores, self._train, strict=True)]
        self._has_codes = np.array([store.has_codes for store in stores])
        self.num_samples = sum(len(rows) for rows in self._train)
        self.off = self._tasks_off()
        self.batch_samples = self._batch_samples()
        self._starts = np.cumsum([0, *(len(rows) for rows in self._train)])

    # ---- training

    def step(self, step: int, world_size: int = 1) -> PlannedStep:
        """Plan of optimiser step `step` (0-based) for this many ranks; the samples do not depend on the ranks."""
        positions = step * self.batch_samples + np.arange(self.batch_samples, dtype=np.int64)
        epoch, store, sample = self._samples_at(positions)
        fraction = step / self.config.schedule.total_steps
        samples = self._draw(epoch, store, sample, self._train_donors, mix=self.config.tasks.mix_at(fraction))
        return self._planned_step(step, samples, world_size)

    def _samples_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seed = self.config.seed
        weights = self.config.data.mix
        if weights is None or len(self.stores) == 1:
            epoch = positions // self.num_samples
            place = permute(positions % self.num_samples, self.num_samples, seed, "order", epoch)
            store = np.searchsorted(self._starts, place, side="right") - 1
            place = place - self._starts[store]
        else:
            epoch, store, place = self._weighted_samples_at(positions, weights)
        sample = np.empty_like(place)
        for number, rows in enumerate(self._train):
            sample[store == number] = rows[place[store == number]]
        return epoch, store, sample

    def _weighted_samples_at(
        self, positions: np.ndarray, weights: tuple[float, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Blocks in which each store has exactly its share of places; a store's own epoch advances at its own pace."""
        shares = np.array(weights) / sum(weights)
        quota = np.floor(shares * _MIX_BLOCK).astype(np.int64)
        quota[np.argsort(quota - shares * _MIX_BLOCK)[: _MIX_BLOCK - quota.sum()]] += 1
        starts = np.cumsum([0, *quota])
        block = positions // _MIX_BLOCK
        slot = permute(positions % _MIX_BLOCK, _MIX_BLOCK, self.config.seed, "mix", block)
        store = np.searchsorted(starts, slot, side="right") - 1
        within = block * quota[store] + slot - starts[store]
        sizes = np.diff(self._starts)[store]
        epoch, place = within // sizes, within % sizes
        for number in range(len(self.stores)):
            own = store == number
            place[own] = permute(place[own], int(sizes[own][0]), self.config.seed, "order", number, epoch[own]) if own.any() else 0
        return epoch, store, place

    # ---- validation

    def validation(self, world_size: int = 1, max_samples: int = 2**62, chunk: int = 512) -> list[PlannedStep]:
        """The fixed validation pass: every possible draw on every sample of the valid split (the first `max_samples`).

        Each PlannedStep holds up to `chunk` samples; its `step` is its place in the list.
        """
        parts = []
        for number, store in enumerate(self.stores):
            valid = store.split_samples(self.config.data.valid_split)[:max_samples]
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
        samples = _concatenate(parts)
        kept = np.flatnonzero(samples.draw >= 0)
        return [
            self._planned_step(place, _select(samples, kept[start : start + chunk]), world_size)
            for place, start in enumerate(range(0, len(kept), chunk))
        ]

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
        source_rows = np.empty((len(sample), 3), dtype=np.int64)
        for number, feature_store in enumerate(self.stores):
            own = store == number
            source_rows[own] = feature_store.rows[sample[own]]
        present = source_rows >= 0
        can_write_image = present[:, IMAGE] & self._has_codes[store]
        source_lengths = self._input_lengths(store, source_rows)
        possible = self._possible(present, source_lengths, can_write_image, donors, store, text_target)
        draw = _choose_draw(key, mix, possible)

        input_rows = source_rows.copy()
        targets_text, targets_image = self._drop_modalities(key, draw, input_rows, can_write_image, text_target)
        case = self._match(key, draw, store, sample, input_rows, donors)
        return PlannedSamples(
            epoch=epoch, store=store, sample=sample, draw=draw, source_rows=source_rows, input_rows=input_rows,
            input_lengths=self._input_lengths(store, input_rows), writes_text=targets_text, writes_image=targets_image,
            text_target_length=np.where(targets_text, source_lengths[:, TEXT], 0), case=case,
        )  # fmt: skip

    def _possible(
        self,
        present: np.ndarray,
        lengths: np.ndarray,
        can_write_image: np.ndarray,
        donors: list[DonorPool],
        store: np.ndarray,
        text_target: bool | None,
    ) -> np.ndarray:
        """bool [B, 5]: which draws each sample allows."""
        num_present = present.sum(1)
        active = self.config.tasks.active_losses
        text_ok = present[:, TEXT] & ("dtr" in active) & (text_target is not False)
        image_ok = can_write_image & ("dir" in active) & (text_target is not True)
        if not self.config.tasks.modality.always_drop_target:
            text_ok, image_ok = present[:, TEXT] & ("dtr" in active), can_write_image & ("dir" in active)
        needed = 2 if self.config.tasks.modality.always_drop_target else 1
        has_donors = np.array([pool.usable for pool in donors])[store]
        return np.stack(
            [
                lengths[:, TEXT] >= 1,
                lengths[:, IMAGE] >= 1,
                lengths[:, AUDIO] >= 2,  # one frame is masked, one stays
                (text_ok | image_ok) & (num_present >= needed),
                (num_present >= 2) & has_donors,
            ],
            axis=1,
        )

    def _drop_modalities(
        self, key: np.ndarray, draw: np.ndarray, rows: np.ndarray, can_write_image: np.ndarray, text_target: bool | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Drop whole modalities of the modality-level samples (in place); say which of them write text, which an image."""
        options, active = self.config.tasks.modality, self.config.tasks.active_losses
        chosen = draw == MODALITY
        present = (rows >= 0) & chosen[:, None]
        text_ok = present[:, TEXT] & ("dtr" in active)
        image_ok = can_write_image & chosen & ("dir" in active)
        dropped = np.zeros_like(present)
        if options.always_drop_target:
            to_text = keyed_uniform(key, "target") < options.text_target_share
            if text_target is not None:
                to_text = np.full(len(draw), text_target)
            to_text = text_ok & (to_text | ~image_ok)
            dropped[:, TEXT] = to_text
            dropped[:, IMAGE] = chosen & ~to_text & image_ok
        always = dropped.copy()
        waiting = np.flatnonzero(chosen)
        for attempt in range(_REDRAWS):  # redrawn when all would go; 0.3^3 of them a time
            if not waiting.size:
                break
            chance = keyed_uniform(key[waiting, None], "drop", attempt, np.arange(3)[None, :]) < options.drop_probability
            dropped[waiting] = (chance | always[waiting]) & present[waiting]
            waiting = waiting[(present[waiting] & ~dropped[waiting]).sum(1) == 0]
        dropped[waiting] = always[waiting]
        rows[dropped] = -1
        if options.always_drop_target:
            return text_ok & dropped[:, TEXT], image_ok & dropped[:, IMAGE]
        return text_ok, image_ok

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
        for number, pool in enumerate(donors):
            own = store[chosen] == number
            if own.any():
                new_rows[own] = pool.replace(new_rows[own], replaced[own], sample[chosen][own], key[own])
        rows[chosen] = new_rows
        return case

    # ---- lengths, counts, micro-batches

    def _input_lengths(self, store: np.ndarray, rows: np.ndarray) -> np.ndarray:
        lengths = np.zeros_like(rows)
        for number, per_row in enumerate(self._lengths):
            for modality in MODALITIES:
                there = (store == number) & (rows[:, modality] >= 0)
                lengths[there, modality] = per_row[modality][rows[there, modality]]
        return lengths

    def _counts(self, s: PlannedSamples) -> dict[str, float]:
        """Terms of each loss over the step: masked items, written tokens and codes, judged samples."""
        p = self.config.tasks.mask_probability
        frames = s.input_lengths[s.draw == MAM, AUDIO]
        regions = int(num_masked(s.input_lengths[s.draw == MVM, IMAGE], p).sum())
        masked_frames = num_masked_frames(frames, p)
        counts = {
            "mlm": int(num_masked(s.input_lengths[s.draw == MLM, TEXT], p).sum()),
            "mvfr": regions,
            "mrc": regions,
            "mafr": int(masked_frames.sum()),
            "mac": int(masked_frames[frames > masked_frames].sum()),  # a frame without negatives is not counted
            "dtr": int((s.text_target_length[s.writes_text] + 1).sum()),  # [SEP] ends the text and is counted
            "dir": int(s.writes_image.sum()) * self.config.model.num_image_codes,
            "matching": int((s.draw == MATCHING).sum()),
        }
        return {loss: float(counts[loss]) for loss in self.config.tasks.active_losses}

    def _planned_step(self, step: int, samples: PlannedSamples, world_size: int) -> PlannedStep:
        positions = 1 + samples.input_lengths.sum(1) + (samples.input_rows[:, TEXT] >= 0)  # [CLS] … [SEP] with text
        positions = positions + np.where(samples.writes_text, samples.text_target_length + 1, 0)
        positions = positions + np.where(samples.writes_image, self.config.model.num_image_codes, 0)
        useful = np.flatnonzero(samples.draw >= 0)
        micro_batches = distribute(useful, positions[useful], world_size, self.config.batch.max_tokens)
        loads = [sum(m.num_tokens for m in rank) for rank in micro_batches]
        total, mean = sum(loads), sum(loads) / world_size
        budget = world_size * len(micro_batches[0]) * self.config.batch.max_tokens
        return PlannedStep(
            step, samples, self._counts(samples), micro_batches, num_tokens=total, fill=total / budget,
            balance=max(loads) / mean if mean else 1.0,
        )  # fmt: skip

    # ---- facts of the stores

    def _batch_samples(self) -> int:
        if self.config.batch.unit == "samples":
            return self.config.batch.size
        tokens = sum(
            float(np.where(store.rows[rows, m] >= 0, lengths[m][np.maximum(store.rows[rows, m], 0)], 0).sum())
            for store, rows, lengths in zip(self.stores, self._train, self._lengths, strict=True)
            for m in MODALITIES
            if len(lengths[m])
        )
        return max(1, round(self.config.batch.size / (2 + tokens / self.num_samples)))

    def _tasks_off(self) -> dict[str, str]:
        """Draw -> why no sample of these stores can take it, or why the config has none of it."""
        subsets = sum(store.split_subsets(self.config.data.train_split) for store in self.stores)
        present = np.flatnonzero(subsets)[:, None] >> np.arange(3) & 1 > 0  # a row for each subset of modalities that occurs
        everywhere = {MLM: "text", MVM: "image", MAM: "audio"}
        active = self.config.tasks.active_losses
        off = {}
        for number, draw in enumerate(DRAWS):
            if not any(loss in active for loss in LOSSES_OF_DRAW[draw]):
                off[draw] = "its weight is 0"
            elif number in everywhere and not present[:, number].any():
                off[draw] = f"no sample has {everywhere[number]}"
            elif number == MATCHING and not any(pool.usable for pool in self._train_donors):
                off[draw] = "no donor: it needs two modalities and two groups in a split"
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


def _choose_draw(key: np.ndarray, mix: dict[str, float], possible: np.ndarray) -> np.ndarray:
    """int8 [B]: a draw with the mix's shares among the possible ones (an impossible one's share goes to the others)."""
    shares = np.array([mix.get(draw, 0.0) for draw in DRAWS])[None, :] * possible
    cumulative = np.cumsum(shares, axis=1)
    total = cumulative[:, -1]
    drawn = (keyed_uniform(key, "draw") * total)[:, None] >= cumulative
    return np.where(total > 0, drawn.sum(1), -1).astype(np.int8)


def _concatenate(parts: list[PlannedSamples]) -> PlannedSamples:
    names = PlannedSamples.__dataclass_fields__
    return PlannedSamples(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _select(samples: PlannedSamples, index: np.ndarray) -> PlannedSamples:
    return PlannedSamples(**{name: getattr(samples, name)[index] for name in PlannedSamples.__dataclass_fields__})
