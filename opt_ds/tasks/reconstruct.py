"""Modality-level reconstruction: the text decoder generates the text (DTR), the image decoder the image codes (DIR).

The loss is −Σ log P(item | previous items, encoder's output), teacher-forced. The text starts with [CLS]. Its end,
[SEP], counts as an item. Entire modalities of the input are dropped, and items of the remaining ones are masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from opt_ds.abilities import GENERATE_IMAGES, WRITE_TEXT
from opt_ds.config import LossConfig
from opt_ds.data.batch import PackedBatch, decoder_targets
from opt_ds.data.flops import decoder_flops
from opt_ds.data.layout import Layout
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import BatchPart, Candidates, SampledTasks, TaskCost
from opt_ds.modalities.text import read_text
from opt_ds.nn.autoregressive import AutoregressiveDecoder
from opt_ds.nn.inputs import DecoderBatch
from opt_ds.ops.keyed import keyed_uniform
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Encoded, Loss, LossTerm, Task
from opt_ds.tasks.baselines import Baseline, SampleBaseline, Terms, TrainingStatistics

_REDRAWS = 32
_BEGIN_OF_CODES = -1  # not a code


class ModalityConfig(LossConfig):
    """Modality-level reconstruction."""

    renamed = {"text_target_share": "text_target_fraction"}  # noqa: RUF012

    drop_probability: float = Field(
        0.3, gt=0, lt=1, description="Probability of dropping each modality from the input."
    )
    always_drop_target: bool = Field(
        False,
        description="Never show the reconstructed modality in the input. A sample then has one target, text or image, and the "
        "other one too if it is dropped by chance.",
    )
    text_target_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="With `always_drop_target`: fraction of samples whose target is text. The others have image targets, whose "
        "weight is `tasks.dir.weight`.",
    )
    condition_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of the training samples with an image target that get no input at all, so that the image "
        "decoder also learns images without a condition. Classifier-free guidance (`--guidance`) requires it; 0.1 is usual. "
        "Such a sample has no text target. 0: none.",
    )


@dataclass
class ReconstructionTargets:
    """Decoder targets of one sample."""

    text: np.ndarray | None = None  # int64 [n]
    text_ends: bool = True  # whether [SEP] follows; false if the model's limit truncated the text
    codes: np.ndarray | None = None  # int64 [image codes]


@dataclass
class ReconstructionBatch(BatchPart):
    """Decoder targets of a batch."""

    text: DecoderBatch
    image: DecoderBatch

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        """Return the positions that the decoders attend to."""
        return (self.text.memory_index, self.image.memory_index)

    @property
    def num_decoder_positions(self) -> int:
        """Return the number of target items of both decoders."""
        return self.text.sequences.total + self.image.sequences.total


def reconstruction_term(decoder: nn.Module, decoder_batch: DecoderBatch, hidden_te: torch.Tensor) -> LossTerm:
    """Return the decoder's summed cross-entropy over all target items."""
    assert isinstance(decoder, AutoregressiveDecoder)
    loss, correct = decoder(decoder_batch, hidden_te)
    return LossTerm(loss, float(len(decoder_batch.target_ids)), {"correct": correct})


def set_code_targets(sample: Sample, codes: np.ndarray) -> None:
    """Set image codes (int64) as the decoder targets of a sample, teacher-forced."""
    sample.targets["modality"] = ReconstructionTargets(codes=codes)


def code_targets(batch: PackedBatch) -> DecoderBatch:
    """Return the image decoder's targets in a batch."""
    part = batch.parts["modality"]
    assert isinstance(part, ReconstructionBatch)
    return part.image


def set_text_targets(candidates: Candidates, sampled: SampledTasks, writes: np.ndarray) -> None:
    """Set the columns of the samples (`writes`, bool [B]) whose text the decoder generates.

    A text that `max_text_tokens` truncates gets no end token. Otherwise the decoder would learn to stop in
    mid-sentence.
    """
    rows = candidates.source_rows[:, TEXT]
    there = writes & (rows >= 0)
    ends = there.copy()
    if candidates.version >= 2:
        for number, per_row in enumerate(candidates.lengths_by_row):
            own = np.flatnonzero(there & (candidates.store == number))
            ends[own] = ~per_row[TEXT].truncated(rows[own])
    sampled.columns["has_text_target"], sampled.columns["text_ends"] = writes, ends
    sampled.columns["text_target_length"] = np.where(there, candidates.lengths[:, TEXT] + ends, 0)


class ModalityReconstruction(Task):
    """Modality-level reconstruction. `sample.targets["modality"]` is a ReconstructionTargets."""

    name = "modality"
    level = "modality"
    about = "Modality-level modelling. Its weight is a factor on `dtr` and `dir`."
    options = ModalityConfig
    losses = (
        Loss(
            "dtr", "text_decoder.", "Denoising text reconstruction by the text decoder.",
            settings=("text_decoder_layers",), ability=WRITE_TEXT,
        ),
        Loss(
            "dir", "image_decoder.", "Denoising image reconstruction by the image decoder.",
            settings=("image_codebook_size", "num_image_codes", "image_positions", "image_decoder_layers"),
            ability=GENERATE_IMAGES,
        ),
    )  # fmt: skip
    masked_modalities = (TEXT, IMAGE, AUDIO)
    columns = {  # noqa: RUF012
        "has_text_target": (np.bool_, False),  # whether the text decoder has a target
        "has_image_target": (np.bool_, False),  # whether the image decoder has a target
        "text_target_length": (np.int64, 0),  # target tokens: WordPieces, and [SEP] if it follows
        "text_ends": (np.bool_, False),  # whether [SEP] follows; false if model.max_text_tokens truncated the text
    }

    # ---- the step plan

    @property
    def num_variants(self) -> int:
        """Two variants with `always_drop_target`, otherwise one.

        The two have text targets and image targets. Otherwise a sample has both.
        """
        return 2 if self.section.always_drop_target else 1

    def disabled(self, present: np.ndarray, stores: list[FeatureStore], derived: Any) -> dict[str, str]:
        """Return reasons if no sample allows reconstruction, or if texts or image codes are missing."""
        reasons = {}
        has_codes = any(store.has_codes for store in stores)
        text_ok = present[:, TEXT].any() and "dtr" in self.active
        image_ok = present[:, IMAGE].any() and "dir" in self.active and has_codes
        if not (text_ok or image_ok) or not (present.sum(1) >= self._needed).any():
            reasons[self.name] = "no sample has a modality to write and one to write it from"
        if not present[:, TEXT].any() and "dtr" in self.active:
            reasons["dtr"] = "no sample has text"
        if not has_codes and "dir" in self.active:
            reasons["dir"] = "no store has image codes (opt-ds train-dvae writes them)"
        return reasons

    @property
    def _needed(self) -> int:
        """Number of modalities that a sample must have."""
        return 2 if self.section.always_drop_target else 1

    def _writable(self, candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
        """Return bool [B] twice: the samples whose text can be a target, and those whose image can be one."""
        has_codes = np.array([store.has_codes for store in candidates.stores])[candidates.store]
        present = candidates.present
        return present[:, TEXT] & ("dtr" in self.active), present[:, IMAGE] & has_codes & ("dir" in self.active)

    def possible(self, candidates: Candidates, derived: Any) -> np.ndarray:
        """Return which samples have a possible target and enough modalities."""
        text_ok, image_ok = self._writable(candidates)
        if self.section.always_drop_target:
            text_ok, image_ok = text_ok & (candidates.variant != 1), image_ok & (candidates.variant != 0)
        return (text_ok | image_ok) & (candidates.present.sum(1) >= self._needed)

    def assign(self, candidates: Candidates, sampled: SampledTasks, own: np.ndarray, derived: Any) -> None:
        """Drop entire modalities from the input and set the targets.

        With `always_drop_target` the targets are the dropped modalities, otherwise all that can be targets.
        """
        options = self.section
        key, present = candidates.key[own], candidates.present[own]
        text_ok, image_ok = (writable[own] for writable in self._writable(candidates))
        always = np.zeros_like(present)  # dropped regardless of chance
        if options.always_drop_target:
            to_text = keyed_uniform(key, "target") < options.text_target_fraction
            if candidates.variant >= 0:
                to_text = np.full(len(own), candidates.variant == 0)
            to_text = text_ok & (to_text | ~image_ok)
            always[:, TEXT] = to_text
            always[:, IMAGE] = ~to_text & image_ok
        dropped = self._dropped(key, present, always)
        to_image = image_ok & (dropped[:, IMAGE] if options.always_drop_target else True)
        unconditional = to_image & self._unconditional(candidates, key)
        rows = sampled.input_rows[own]
        rows[dropped | unconditional[:, None]] = -1
        sampled.input_rows[own] = rows
        has_text_target = np.zeros(len(sampled.task), dtype=bool)
        has_text_target[own] = text_ok & (dropped[:, TEXT] if options.always_drop_target else True) & ~unconditional
        sampled.columns["has_image_target"][own] = to_image
        set_text_targets(candidates, sampled, has_text_target)

    def _unconditional(self, candidates: Candidates, key: np.ndarray) -> np.ndarray:
        """Return which samples get no input if they have an image target, bool [n]. In validation none does.

        Their encoder input is [CLS] alone, whose encoding is the learned null condition.
        """
        probability = self.section.condition_dropout if candidates.variant < 0 else 0.0
        return keyed_uniform(key, "no input") < probability

    def _dropped(self, key: np.ndarray, present: np.ndarray, always: np.ndarray) -> np.ndarray:
        """Return which modalities are dropped, bool [n, M]. At least one remains in the input."""
        dropped = always.copy()
        waiting = np.arange(len(key))
        # Sampled again if all modalities would be dropped; 0.3^3 of the samples with three modalities each time.
        for attempt in range(_REDRAWS):
            if not waiting.size:
                break
            uniform = keyed_uniform(key[waiting, None], "drop", attempt, np.arange(present.shape[1])[None, :])
            chance = uniform < self.section.drop_probability
            dropped[waiting] = (chance | always[waiting]) & present[waiting]
            waiting = waiting[(present[waiting] & ~dropped[waiting]).sum(1) == 0]
        dropped[waiting] = always[waiting]
        return dropped

    def num_terms(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of target items of both decoders, for all tasks that set decoder targets."""
        columns = samples.columns
        return {
            "dtr": float(columns["text_target_length"][columns["has_text_target"]].sum()),
            "dir": float(columns["has_image_target"].sum()) * self.config.model.num_image_codes,
        }

    def num_samples(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of samples with items of each decoder, for all tasks that set decoder targets."""
        columns = samples.columns
        writes = columns["has_text_target"] & (columns["text_target_length"] > 0)
        return {"dtr": float(writes.sum()), "dir": float(columns["has_image_target"].sum())}

    def add_cost(self, samples: StepSamples, positions: np.ndarray, total: TaskCost) -> None:
        """Add the cost of the decoders, for all tasks that set decoder targets."""
        columns, model = samples.columns, self.config.model
        writing = np.flatnonzero(columns["has_text_target"] | columns["has_image_target"])
        total.output_positions[writing] += positions[writing].astype(np.int64)
        for layers, outputs, writes, items in (
            (model.text_decoder_layers, model.vocab_size, columns["has_text_target"], columns["text_target_length"]),
            (model.image_decoder_layers, model.image_codebook_size, columns["has_image_target"], model.num_image_codes),
        ):
            own = np.flatnonzero((samples.task >= 0) & writes & (items > 0))
            num_items = np.broadcast_to(items, len(samples))[own]
            total.decoder_positions[own] += num_items
            total.decoder_flops[own] += decoder_flops(model, layers, outputs, num_items, positions[own])

    # ---- samples and batches

    def add_targets(self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore) -> None:
        """Set the decoder targets of the sample."""
        targets, columns = ReconstructionTargets(), samples.columns
        if columns["has_text_target"][index]:
            targets.text = read_text(store, samples.source_rows[index, TEXT], self.config.model.max_text_tokens)
            targets.text_ends = bool(columns["text_ends"][index])
        if columns["has_image_target"][index]:
            targets.codes = store.codes(samples.source_rows[index, IMAGE]).astype(np.int64)
        sample.targets["modality"] = targets

    def collate(self, samples: Sequence[Sample], layout: Layout) -> BatchPart | None:
        """Return the decoder targets of the batch."""
        wanted = {i: sample.targets["modality"] for i, sample in enumerate(samples) if "modality" in sample.targets}
        text = {  # The first token is [CLS]; the last one is [SEP], which is a target only if the text ends there.
            i: np.append(target.text, layout.sep_id) if target.text_ends else target.text
            for i, target in wanted.items()
            if target.text is not None
        }
        codes = {i: target.codes for i, target in wanted.items() if target.codes is not None}
        return ReconstructionBatch(
            text=decoder_targets(samples, layout, text, layout.cls_id),
            image=decoder_targets(samples, layout, codes, _BEGIN_OF_CODES),
        )

    # ---- the model and its baseline

    @classmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        """Return the terms of both decoders."""
        assert isinstance(part, ReconstructionBatch)
        return {
            "dtr": reconstruction_term(encoded.decoders[TEXT], part.text, encoded.hidden_te),
            "dir": reconstruction_term(encoded.decoders[IMAGE], part.image, encoded.hidden_te),
        }

    def baseline(self, statistics: TrainingStatistics) -> Baseline | None:
        """Return the losses of counts in context.

        DTR: a token, or the end of the text, by the two tokens before it. DIR: an image code by its position and the
        codes to the left and above.
        """

        def losses(sample: Sample, number: int) -> dict[str, Terms]:
            targets: ReconstructionTargets = sample.targets["modality"]
            found = {}
            if targets.text is not None:
                found["dtr"] = statistics.next_token_terms(targets.text.astype(np.int64), targets.text_ends)
            if targets.codes is not None:
                found["dir"] = statistics.code_terms(targets.codes)
            return found

        return SampleBaseline("modality", losses)
