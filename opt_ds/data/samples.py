"""One planned sample made concrete: its rows read from the store, its items masked, its targets cut out.

n: WordPieces, r: regions, a: model frames (stored frames joined by `audio_stack`), v: feature width.
"""

from dataclasses import dataclass, field

import numpy as np

from opt_ds.config import Config
from opt_ds.data.keyed import keyed_choice, keyed_hash
from opt_ds.data.lengths import stacked_length
from opt_ds.data.masking import corrupt_tokens, masked_items, masked_spans, num_masked, num_masked_frames
from opt_ds.data.planned import (
    AUDIO,
    IMAGE,
    LABELS,
    MAM,
    MLM,
    MODALITY,
    MVM,
    TEXT,
    VALIDATION_EPOCH,
    PlannedSamples,
)
from opt_ds.store.reader import FeatureStore


@dataclass
class Sample:
    """What one sequence of a batch holds. Absent modalities are None; absent targets too."""

    name: str = ""
    slot: int = 0  # place in the global batch: the key of dropout that does not depend on the ranks
    token_ids: np.ndarray | None = None  # int64 [n], corrupted, without [CLS] and [SEP]
    region_features: np.ndarray | None = None  # float16 [r, v], original
    region_boxes: np.ndarray | None = None  # float32 [r, 7]
    region_labels: np.ndarray | None = None  # int64 [r]
    region_masked: np.ndarray | None = None  # bool [r]; None: none
    frames: np.ndarray | None = None  # float16 [a, stack · v], original
    frame_masked: np.ndarray | None = None  # bool [a]; None: none
    mlm_masked: np.ndarray | None = None  # bool [n], the tokens to predict
    mlm_targets: np.ndarray | None = None  # int64 [n], the original tokens
    predict_regions: bool = False
    predict_frames: bool = False
    written_text: np.ndarray | None = field(default=None)  # int64 [n], the text decoder's target
    text_ends: bool = True  # [SEP] follows it: not where the model's limit truncated it
    written_codes: np.ndarray | None = field(default=None)  # int64 [64], the image decoder's target
    case: int = -1  # matching case
    label_targets: np.ndarray | None = None  # float32 [names of the label head], 0 … 1


def given(part: np.ndarray | None) -> np.ndarray:
    """An optional part of a sample where its modality or task says that it is there."""
    assert part is not None, "the sample lacks a part that its modality or task needs"
    return part


class SampleReader:
    """Makes `Sample`s of a plan's slots. Holds the stores and the keys, no state."""

    def __init__(self, config: Config, stores: list[FeatureStore]) -> None:
        self.config, self.stores = config, stores
        self._tokenizers = [store.description.tokenizer for store in stores]
        self._ordinary = [_ordinary_ids(store) for store in stores]
        labels = config.tasks.labels
        self._label_places = {name: place for place, name in enumerate(labels.names)} if labels else {}

    def read(self, planned: PlannedSamples, slot: int) -> Sample:
        """The sample in this slot of the step, masked as its key says."""
        number = int(planned.store[slot])
        store, rows, draw = self.stores[number], planned.input_rows[slot], int(planned.draw[slot])
        epoch = int(planned.epoch[slot])
        key = int(keyed_hash(self.config.seed, "masks", epoch, number, int(planned.sample[slot])))
        sample = Sample(
            name=f"{store.name}/{store.sample_id(int(planned.sample[slot]))}", slot=slot, case=int(planned.case[slot])
        )
        if rows[TEXT] >= 0:
            tokens = self._tokens(store, rows[TEXT])
            masked = self._masked(planned, slot, TEXT, len(tokens), key)
            sample.token_ids = tokens
            if masked is not None:
                mask_id = self._tokenizers[number].mask_id
                sample.token_ids = corrupt_tokens(tokens, masked, mask_id, self._ordinary[number], key)
            if draw == MLM:
                sample.mlm_masked, sample.mlm_targets = masked, tokens
        if rows[IMAGE] >= 0:
            self.read_regions(sample, store, rows[IMAGE])
            sample.region_masked = self._masked(planned, slot, IMAGE, len(given(sample.region_features)), key)
            sample.predict_regions = draw == MVM
        if rows[AUDIO] >= 0:
            training = epoch < VALIDATION_EPOCH
            offset = (
                int(keyed_choice(self.config.model.audio_stack, key, "offset"))
                if training and self.config.data.frame_offset
                else 0
            )
            self.read_frames(sample, store, rows[AUDIO], offset)
            sample.frame_masked = self._masked(planned, slot, AUDIO, len(given(sample.frames)), key)
            sample.predict_frames = draw == MAM
        if planned.writes_text[slot]:
            sample.written_text = self._tokens(store, planned.source_rows[slot, TEXT])
            sample.text_ends = bool(planned.text_ends[slot])
        if planned.writes_image[slot]:
            sample.written_codes = store.codes(planned.source_rows[slot, IMAGE]).astype(np.int64)
        if draw == LABELS:
            sample.label_targets = self.label_targets(number, int(planned.sample[slot]))
        return sample

    def read_ahead(self, planned: PlannedSamples, slots: np.ndarray) -> int:
        """Have the features of these samples read from the disk soon, without waiting; returns their bytes."""
        total = 0
        for number, (_, image, audio) in zip(planned.store[slots].tolist(), planned.input_rows[slots].tolist(), strict=True):
            store = self.stores[number]
            total += store.read_ahead("image", image) if image >= 0 else 0
            total += store.read_ahead("audio", audio) if audio >= 0 else 0
        return total

    def label_targets(self, number: int, index: int) -> np.ndarray:
        """Return float32 [names of the label head]: 1 for a sample's labels.

        For answers min(times given / 3, 1) (Antol et al. 2015); where fewer than three annotators answered, their number.
        """
        labels = self.config.tasks.labels
        assert labels is not None, "the model has no label head"
        times = np.zeros(len(labels.names), dtype=np.float32)
        for name in self.stores[number].labels(index):
            if name in self._label_places:
                times[self._label_places[name]] += 1
        agreement = self.config.finetune.agreement if self.config.finetune else 3
        return np.minimum(times / (agreement if labels.answers else 1), 1)

    def whole(self, number: int, index: int, modalities: tuple[int, ...] = (TEXT, IMAGE, AUDIO)) -> Sample:
        """A store's sample uncorrupted, with just these modalities (those that it has): for evaluation."""
        store = self.stores[number]
        rows = store.rows[index]
        sample = Sample(name=f"{store.name}/{store.sample_id(index)}")
        if TEXT in modalities and rows[TEXT] >= 0:
            sample.token_ids = self._tokens(store, rows[TEXT])
        if IMAGE in modalities and rows[IMAGE] >= 0:
            self.read_regions(sample, store, rows[IMAGE])
        if AUDIO in modalities and rows[AUDIO] >= 0:
            self.read_frames(sample, store, rows[AUDIO], 0)
        return sample

    def read_regions(self, sample: Sample, store: FeatureStore, row: int) -> None:
        regions, limit = store.regions(row), self.config.model.max_regions
        sample.region_features, sample.region_boxes = regions.features[:limit], regions.boxes[:limit]
        sample.region_labels = regions.labels[:limit].astype(np.int64)

    def read_frames(self, sample: Sample, store: FeatureStore, row: int, offset: int) -> None:
        sample.frames = stack_frames(store.frames(row), self.config.model.audio_stack, offset)[: self.config.model.max_frames]

    def _tokens(self, store: FeatureStore, row: int) -> np.ndarray:
        return store.text(row)[: self.config.model.max_text_tokens].astype(np.int64)

    def _masked(self, planned: PlannedSamples, slot: int, modality: int, length: int, key: int) -> np.ndarray | None:
        draw_masks = planned.draw[slot] == (MLM, MVM, MAM)[modality] or planned.draw[slot] == MODALITY
        if not draw_masks:
            return None
        tasks = self.config.tasks
        if modality == AUDIO:
            count = int(num_masked_frames(length, tasks.mask_probability))
            return masked_spans(length, count, tasks.mam.span, key, modality)
        return masked_items(length, int(num_masked(length, tasks.mask_probability)), key, modality)


def stack_frames(frames: np.ndarray, stack: int, offset: int) -> np.ndarray:
    """[T, v] -> [a, stack · v]: `stack` frames side by side; the first frame is repeated `offset` times before, the last one
    after, as needed. a does not depend on the offset (0 <= offset < stack)."""
    if stack == 1 or not len(frames):
        return frames.reshape(len(frames), stack * frames.shape[1])
    count = int(stacked_length(len(frames), stack))
    place = np.clip(np.arange(count * stack) - offset, 0, len(frames) - 1)
    return frames[place].reshape(count, -1)


def _ordinary_ids(store: FeatureStore) -> np.ndarray:
    """What a random replacement may be: every id but the special ones."""
    t = store.description.tokenizer
    return np.setdiff1d(np.arange(store.description.dims.vocab_size), [t.pad_id, t.unk_id, t.cls_id, t.sep_id, t.mask_id])
