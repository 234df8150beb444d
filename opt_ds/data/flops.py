"""Floating-point operations of a planned step: what the model has to compute, whatever the kernels and the padding.

A multiplication and an addition are two operations. Counted are matrix products, attention's among them; causal attention is
counted in full, as is usual. Backward takes twice the forward pass, except for projections of raw features, whose input needs
no gradient.
"""

from dataclasses import dataclass

import numpy as np

from opt_ds.config import Config
from opt_ds.data.masking import num_masked, num_masked_frames
from opt_ds.data.matching import NUM_CASES
from opt_ds.data.planned import AUDIO, DRAWS, IMAGE, LABELS, MAM, MATCHING, MLM, MVM, TEXT, PlannedSamples


@dataclass(frozen=True)
class StepFlops:
    """Forward operations by part of the model, for a set of samples."""

    embeddings: float
    encoder: float
    decoders: float
    heads: float

    @property
    def forward(self) -> float:
        return self.embeddings + self.encoder + self.decoders + self.heads

    @property
    def total(self) -> float:
        """Forward and backward."""
        return 3 * self.forward - self.embeddings


def step_flops(config: Config, samples: PlannedSamples) -> StepFlops:
    """Operations of training once on these samples."""
    return _summed(_forward_flops(config, samples))


def sample_flops(config: Config, samples: PlannedSamples) -> np.ndarray:
    """float64 [B]: operations of training once on each sample."""
    return sample_and_step_flops(config, samples)[0]


def sample_and_step_flops(config: Config, samples: PlannedSamples) -> tuple[np.ndarray, float]:
    """float64 [B], operations of training once on each sample; and on all of them."""
    parts = _forward_flops(config, samples)
    embeddings, encoder, decoders, heads = parts
    return 2 * embeddings + 3 * (encoder + decoders + heads), _summed(parts).total


def _summed(parts: tuple[np.ndarray, ...]) -> StepFlops:
    return StepFlops(*(float(part.sum()) for part in parts))


def _forward_flops(config: Config, samples: PlannedSamples) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """float64 [B] each: operations of embeddings, encoder, decoders and heads. A sample that nothing is learned from has none.

    They are whole numbers far below 2^53, so that no order of adding them rounds.
    """
    model, draw = config.model, samples.draw
    _, regions, frames = samples.input_lengths.T
    width, ffn, used = model.hidden_size, model.ffn_size, draw >= 0
    frame_dim = model.audio_stack * model.audio_feature_dim
    positions = (used * samples.input_positions()).astype(np.float64)
    predicted = _predicted_items(config, samples)

    per_position, keys_and_values = 2 * (4 * width**2 + 2 * width * ffn), 4 * width**2
    squares = 4 * width * positions  # of attention, for each position
    whole_layer, last_layer = per_position + squares, per_position - keys_and_values + squares
    encoder = (model.num_layers - 1) * positions * whole_layer + keys_and_values * positions
    encoder += last_layer * _read_positions(samples, positions, predicted)  # computed where something reads it

    decoders = np.zeros(len(samples))
    for layers, outputs, writes, written in (
        (model.text_decoder_layers, model.vocab_size, samples.writes_text, samples.text_target_length),
        (model.image_decoder_layers, model.image_codebook_size, samples.writes_image, model.num_image_codes),
    ):
        own = np.flatnonzero(used & writes & (written > 0))
        rows = np.broadcast_to(written, len(samples))[own].astype(np.float64)
        memory = positions[own]
        attention = 4 * width * (np.square(rows) + rows * memory)
        projections = 2 * (6 * width**2 + 2 * width * ffn) * rows + 4 * width**2 * memory
        decoders[own] += layers * (projections + attention) + 2 * rows * width * outputs

    num_labels = len(config.tasks.labels.names) if config.tasks.labels else 0
    of_item, of_sample = np.zeros(len(DRAWS) + 1), np.zeros(len(DRAWS) + 1)  # the last place is that of draw -1
    of_item[MLM] = width**2 + width * model.vocab_size
    of_item[MVM] = width * (model.image_feature_dim + model.image_num_classes)
    of_item[MAM] = width * 2 * frame_dim
    of_sample[MATCHING], of_sample[LABELS] = width * NUM_CASES, width**2 + width * num_labels
    heads = 2.0 * (predicted * of_item[draw] + of_sample[draw])
    compared = np.flatnonzero(draw == MAM)  # with every frame of the utterance
    heads[compared] += 2.0 * predicted[compared] * frames[compared] * frame_dim
    embeddings = 2.0 * width * used * (regions * (model.image_feature_dim + 7) + frames * frame_dim)
    return embeddings, encoder, decoders, heads


def _predicted_items(config: Config, samples: PlannedSamples) -> np.ndarray:
    """int64 [B]: masked items that a token-level sample predicts."""
    predicted, p = np.zeros(len(samples), np.int64), config.tasks.mask_probability
    for draw, modality, count in ((MLM, TEXT, num_masked), (MVM, IMAGE, num_masked), (MAM, AUDIO, num_masked_frames)):
        own = np.flatnonzero(samples.draw == draw)
        predicted[own] = count(samples.input_lengths[own, modality], p)
    return predicted


def _read_positions(samples: PlannedSamples, positions: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """float64 [B]: positions of the encoder's output that a head or a decoder reads."""
    read = predicted + (samples.writes_text | samples.writes_image) * positions
    read[(samples.draw == MATCHING) | (samples.draw == LABELS)] = 1
    return read
