"""Samples of the benchmark: a synthetic store, the optimiser steps taken from it, and their micro-batches.

Every method trains on the same samples in a step. It divides them into micro-batches in its own way.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from opt_ds.config import load_config
from opt_ds.data.batch import PackedBatch, Packer
from opt_ds.data.flops import step_flops
from opt_ds.data.micro_batches import distribute
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.data.step_samples import select
from opt_ds.store.reader import FeatureStore
from opt_ds.store.synthetic import write_synthetic_store

POOL = 32  # smallest number of micro-batches whose samples are sorted into buckets of similar length


@dataclass(frozen=True)
class Mix:
    """Smallest and largest lengths of the samples, and the number of samples per micro-batch."""

    text: tuple[int, int]
    regions: tuple[int, int]
    frames: tuple[int, int]  # before stacking
    samples: int
    model: tuple[str, ...] = ()  # settings of the model


MIXES = {
    # 46–190 items, like narratives over detected regions
    "long": Mix((6, 54), (10, 56), (30, 80), 16),
    # names of emoji: a few words, 16 grid cells, 8 stacked log-mel frames
    "emoji": Mix((2, 9), (16, 16), (70, 200), 40,
                 ("model.image_feature_dim=1280", "model.audio_feature_dim=80", "model.audio_stack=8",
                  "model.max_regions=16")),
}  # fmt: skip


@dataclass(frozen=True)
class StepSamples:
    """Samples of one optimiser step, sorted into buckets of similar length. Each bucket is int64 sample indices."""

    buckets: list[np.ndarray]

    @property
    def indices(self) -> np.ndarray:
        """All sample indices of the step, int64, ascending."""
        return np.sort(np.concatenate(self.buckets))

    def random(self) -> list[np.ndarray]:
        """Return micro-batches of the same number of random samples."""
        order = np.random.default_rng(len(self.indices)).permutation(self.indices)
        return [np.sort(part) for part in np.array_split(order, len(self.buckets))]


class MixData:
    """A synthetic store of a mix, the configuration of the model, and the samples of a step plan."""

    def __init__(
        self,
        folder: Path,
        mix: Mix,
        settings: list[str],
        device: torch.device,
        pool: int = POOL,
        taken: int | None = None,
    ) -> None:
        """Open the store, or write it if it does not exist.

        Args:
            folder: Folder of the store. Data with the same mix can share it.
            mix: Lengths of the samples.
            settings: Further settings of the configuration, `key.path=value`.
            device: Device of the packed batches.
            pool: Number of micro-batches that the store has samples for.
            taken: Number of micro-batches whose samples are planned. None: `pool`.
        """
        self.device, self.pool = device, pool if taken is None else taken
        longest = 2 + mix.text[1] + mix.regions[1] + mix.frames[1]
        self.config = load_config("opt-base", [
            "model.text_decoder_layers=1", "model.image_decoder_layers=1", f"batch.size={self.pool * mix.samples}",
            f"batch.max_tokens={100 * longest}", "train.image_grid=0", f"data.stores=[{folder}]",
            *mix.model, *settings,
        ])  # fmt: skip
        model = self.config.model
        if not folder.exists():
            write_synthetic_store(
                folder, int(pool * mix.samples * 1.25) + 8, text_len=mix.text, regions=mix.regions, frames=mix.frames,
                image_feature_dim=model.image_feature_dim, audio_feature_dim=model.audio_feature_dim,
                image_num_classes=model.image_num_classes, vocab_size=model.vocab_size,
                num_codes_vocab=model.image_codebook_size, pixels=False,
            )  # fmt: skip
        self.stores = [FeatureStore(folder)]
        self.step_plan = PretrainingPlan(self.config, self.stores).step(0)
        self.lengths = self.step_plan.samples.input_positions().astype(np.int64)
        self._reader = SampleReader(self.config, self.stores)
        self._packer = Packer(self.config, self.stores[0].description.tokenizer)

    def pack(self, indices: np.ndarray) -> PackedBatch:
        """Return the packed batch of these samples on the device."""
        batch = self._packer.pack([self._reader.read(self.step_plan.samples, int(index)) for index in indices])
        return batch.to(self.device)

    def flops(self, indices: np.ndarray) -> float:
        """Return the needed operations of a forward and backward pass on these samples."""
        return step_flops(self.config, select(self.step_plan.samples, indices)).total

    def steps(self, count: int, micro_batches: int) -> list[StepSamples]:
        """Return the samples of `count` optimiser steps, each of `micro_batches` buckets of similar length.

        The buckets are those of a run: all planned samples are sorted by length. They are then put into as many groups
        as a step has buckets, shortest first. Each step gets a random bucket of each group, so that short and long
        samples are equally frequent in all steps. No bucket is in two steps.
        """
        buckets = length_buckets(self.lengths, int(self.lengths.sum() / self.pool))
        per_group = len(buckets) // micro_batches
        if per_group < count:
            raise ValueError(f"{count} steps of {micro_batches} micro-batches need more than {len(buckets)} buckets")
        rng = np.random.default_rng(1)
        groups = [group * per_group + rng.permutation(per_group) for group in range(micro_batches)]
        return [StepSamples([buckets[group[step]] for group in groups]) for step in range(count)]


def length_buckets(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Return buckets of samples of similar length, as UNITER's `TokenBucketSampler` makes them, shortest first.

    Args:
        lengths: int64 [n], positions of each sample.
        budget: Most positions of a bucket, including padding.

    Returns:
        int64 sample indices of each bucket. The last bucket is omitted if it is less than half full.
    """
    buckets: list[list[int]] = [[]]
    for index in np.argsort(lengths, kind="stable").tolist():
        if buckets[-1] and lengths[index] * (len(buckets[-1]) + 1) > budget:
            buckets.append([])
        buckets[-1].append(index)
    if len(buckets) > 1 and lengths[buckets[-1]].sum() < budget / 2:
        buckets.pop()
    return [np.array(bucket, np.int64) for bucket in buckets]


def packed_micro_batches(indices: np.ndarray, lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """Return at most `count` micro-batches with about the same number of positions, distributed as in a run.

    Args:
        indices: int64 [n], sample indices, ascending.
        lengths: Positions of every sample of the step plan; `indices` selects from them.
        count: Number of micro-batches.
    """
    own = lengths[indices]
    budget = max(int(own.max()), -(-int(own.sum()) // count))
    while len(found := distribute(indices, own, 1, budget)[0]) > count:
        budget += budget // 100 + 1
    return [micro_batch.indices for micro_batch in found]
