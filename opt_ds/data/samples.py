"""Sample reader: reads the rows of a planned sample from the store, masks its items and sets its targets.

Legend: n WordPieces, r regions, a model frames (`audio_stack` stored frames each), v feature width.
"""

import numpy as np

from opt_ds.config import Config
from opt_ds.data.lengths import stacked_length
from opt_ds.data.masking import corrupt_tokens, masked_items, masked_spans, num_masked, num_masked_frames
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.planned_samples import VALIDATION_EPOCH, PlannedSamples
from opt_ds.data.sample import Sample, given
from opt_ds.data.task import tasks_of
from opt_ds.ops.keyed import keyed_choice, keyed_hash
from opt_ds.store.reader import FeatureStore


class SampleReader:
    """Reads `Sample`s of a step plan. It holds the stores and the keys, and no state."""

    def __init__(self, config: Config, stores: list[FeatureStore]) -> None:
        self.config, self.stores = config, stores
        self._tokenizers = [store.description.tokenizer for store in stores]
        self._ordinary = [_ordinary_ids(store) for store in stores]
        self._tasks = list(tasks_of(config).values())
        self._spans = {modality: span for task in self._tasks for modality, span in task.mask_spans.items()}

    def read(self, planned: PlannedSamples, slot: int) -> Sample:
        """Return the sample with this global sample index, masked by its key, with the targets of its task."""
        number, store, rows = int(planned.store[slot]), self.stores[int(planned.store[slot])], planned.input_rows[slot]
        task = self._tasks[planned.task[slot]] if planned.task[slot] >= 0 else None
        masked = task.masked_modalities if task else ()
        epoch = int(planned.epoch[slot])
        key = int(keyed_hash(self.config.seed, "masks", epoch, number, int(planned.sample[slot])))
        sample = Sample(name=f"{store.name}/{store.sample_id(int(planned.sample[slot]))}", slot=slot)
        if rows[TEXT] >= 0:
            self.read_tokens(sample, store, rows[TEXT])
            if TEXT in masked:
                self._mask_tokens(sample, number, key)
        if rows[IMAGE] >= 0:
            self.read_regions(sample, store, rows[IMAGE])
            if IMAGE in masked:
                count = num_masked(len(given(sample.region_features)), self._mask_probability)
                sample.region_masked = masked_items(len(given(sample.region_features)), int(count), key, IMAGE)
        if rows[AUDIO] >= 0:
            training = epoch < VALIDATION_EPOCH
            offset = (
                int(keyed_choice(self.config.model.audio_stack, key, "offset"))
                if training and self.config.data.frame_offset
                else 0
            )
            self.read_frames(sample, store, rows[AUDIO], offset)
            if AUDIO in masked:
                count = num_masked_frames(len(given(sample.frames)), self._mask_probability)
                sample.frame_masked = masked_spans(len(given(sample.frames)), int(count), self._spans[AUDIO], key, AUDIO)
        if task:
            task.add_targets(sample, planned, slot, store)
        return sample

    @property
    def _mask_probability(self) -> float:
        return self.config.tasks.mask_probability

    def _mask_tokens(self, sample: Sample, number: int, key: int) -> None:
        tokens = given(sample.token_ids)
        masked = masked_items(len(tokens), int(num_masked(len(tokens), self._mask_probability)), key, TEXT)
        mask_id = self._tokenizers[number].mask_id
        sample.tokens_masked, sample.original_ids = masked, tokens
        sample.token_ids = corrupt_tokens(tokens, masked, mask_id, self._ordinary[number], key)

    def read_ahead(self, planned: PlannedSamples, slots: np.ndarray) -> int:
        """Start reading the features of these samples from disk, without waiting. Return their number of bytes."""
        total = 0
        for number, (_, image, audio) in zip(planned.store[slots].tolist(), planned.input_rows[slots].tolist(), strict=True):
            store = self.stores[number]
            total += store.read_ahead("image", image) if image >= 0 else 0
            total += store.read_ahead("audio", audio) if audio >= 0 else 0
        return total

    def whole(self, number: int, index: int, modalities: tuple[int, ...] = (TEXT, IMAGE, AUDIO)) -> Sample:
        """Return a store's sample without masking, with only those of these modalities that it has, for evaluation."""
        store = self.stores[number]
        rows = store.rows[index]
        sample = Sample(name=f"{store.name}/{store.sample_id(index)}")
        if TEXT in modalities and rows[TEXT] >= 0:
            self.read_tokens(sample, store, rows[TEXT])
        if IMAGE in modalities and rows[IMAGE] >= 0:
            self.read_regions(sample, store, rows[IMAGE])
        if AUDIO in modalities and rows[AUDIO] >= 0:
            self.read_frames(sample, store, rows[AUDIO], 0)
        return sample

    def read_tokens(self, sample: Sample, store: FeatureStore, row: int) -> None:
        """Read the text of the sample."""
        sample.token_ids = read_text(store, row, self.config.model.max_text_tokens)

    def read_regions(self, sample: Sample, store: FeatureStore, row: int) -> None:
        """Read the regions of the sample."""
        regions, limit = store.regions(row), self.config.model.max_regions
        sample.region_features, sample.region_boxes = regions.features[:limit], regions.boxes[:limit]
        sample.region_labels = regions.labels[:limit].astype(np.int64)

    def read_frames(self, sample: Sample, store: FeatureStore, row: int, offset: int) -> None:
        """Read the frames of the sample and stack them.

        Args:
            sample: The sample, which is changed.
            store: Its store.
            row: Audio row of the store.
            offset: Offset of the first stacked frame, from 0 to audio_stack − 1.
        """
        sample.frames = stack_frames(store.frames(row), self.config.model.audio_stack, offset)[: self.config.model.max_frames]


def read_text(store: FeatureStore, row: int, max_tokens: int) -> np.ndarray:
    """Return the first `max_tokens` WordPieces of a text row, int64 [n]."""
    return store.text(row)[:max_tokens].astype(np.int64)


def stack_frames(frames: np.ndarray, stack: int, offset: int) -> np.ndarray:
    """Return frames [T, v] as [a, stack · v], with `stack` frames per row.

    The first frame is repeated `offset` times at the start, and the last one at the end as needed. `a` does not depend
    on the offset (0 <= offset < stack).
    """
    if stack == 1 or not len(frames):
        return frames.reshape(len(frames), stack * frames.shape[1])
    count = int(stacked_length(len(frames), stack))
    place = np.clip(np.arange(count * stack) - offset, 0, len(frames) - 1)
    return frames[place].reshape(count, -1)


def _ordinary_ids(store: FeatureStore) -> np.ndarray:
    """Return the ids that may replace a masked token: all ids except the special ones."""
    t = store.description.tokenizer
    return np.setdiff1d(np.arange(store.description.dims.vocab_size), [t.pad_id, t.unk_id, t.cls_id, t.sep_id, t.mask_id])
