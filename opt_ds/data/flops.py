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
from opt_ds.data.planned import AUDIO, IMAGE, LABELS, MAM, MATCHING, MLM, MVM, TEXT, PlannedSamples


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
    return StepFlops(*(float(part.sum()) for part in _forward_flops(config, samples)))


def sample_flops(config: Config, samples: PlannedSamples) -> np.ndarray:
    """float64 [B]: operations of training once on each sample."""
    embeddings, *others = _forward_flops(config, samples)
    return 2 * embeddings + 3 * sum(others)


def _forward_flops(config: Config, samples: PlannedSamples) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """float64 [B] each: operations of embeddings, encoder, decoders and heads. A sample that nothing is learned from has none."""
    model, lengths, draw = config.model, samples.input_lengths, samples.draw
    width, ffn, used = model.hidden_size, model.ffn_size, draw >= 0
    frame_dim = model.audio_stack * model.audio_feature_dim
    positions = (used * (1 + lengths.sum(1) + (samples.input_rows[:, TEXT] >= 0))).astype(np.float64)

    per_position, keys_and_values = 2 * (4 * width**2 + 2 * width * ffn), 4 * width**2
    read = _read_positions(config, samples, positions)  # the last layer is computed where something reads it
    encoder = (model.num_layers - 1) * (per_position * positions + 4 * width * np.square(positions))
    encoder += keys_and_values * positions + (per_position - keys_and_values + 4 * width * positions) * read

    decoders = np.zeros(len(samples))
    for layers, outputs, written in (
        (model.text_decoder_layers, model.vocab_size, samples.writes_text * samples.text_target_length),
        (model.image_decoder_layers, model.image_codebook_size, samples.writes_image * model.num_image_codes),
    ):
        rows = (used * written).astype(np.float64)
        memory = positions * (rows > 0)
        attention = 4 * width * (np.square(rows) + rows * memory)
        projections = 2 * (6 * width**2 + 2 * width * ffn) * rows + 4 * width**2 * memory
        decoders += layers * (projections + attention) + 2 * rows * width * outputs

    p = config.tasks.mask_probability
    frames = np.where(draw == MAM, num_masked_frames(lengths[:, AUDIO], p), 0).astype(np.float64)
    num_labels = len(config.tasks.labels.names) if config.tasks.labels else 0
    heads = 2.0 * (
        np.where(draw == MLM, num_masked(lengths[:, TEXT], p), 0) * (width**2 + width * model.vocab_size)
        + np.where(draw == MVM, num_masked(lengths[:, IMAGE], p), 0) * width * (model.image_feature_dim + model.image_num_classes)
        + frames * width * 2 * frame_dim
        + frames * lengths[:, AUDIO] * frame_dim
        + (draw == MATCHING) * width * NUM_CASES
        + (draw == LABELS) * (width**2 + width * num_labels)
    )
    embeddings = 2.0 * width * used * (
        lengths[:, IMAGE] * (model.image_feature_dim + 7) + lengths[:, AUDIO] * frame_dim
    )
    return embeddings, encoder, decoders, heads


def _read_positions(config: Config, samples: PlannedSamples, positions: np.ndarray) -> np.ndarray:
    """float64 [B]: positions of the encoder's output that a head or a decoder reads."""
    p, lengths = config.tasks.mask_probability, samples.input_lengths
    read = np.where(samples.writes_text | samples.writes_image, positions, 0)
    read = np.where(samples.draw == MLM, num_masked(lengths[:, TEXT], p), read)
    read = np.where(samples.draw == MVM, num_masked(lengths[:, IMAGE], p), read)
    read = np.where(samples.draw == MAM, num_masked_frames(lengths[:, AUDIO], p), read)
    return np.where((samples.draw == MATCHING) | (samples.draw == LABELS), 1, read).astype(np.float64)
