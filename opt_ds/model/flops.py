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
    used = samples.draw >= 0
    model, lengths = config.model, samples.input_lengths[used]
    width, ffn = model.hidden_size, model.ffn_size
    frame_dim = model.audio_stack * model.audio_feature_dim
    positions = (1 + lengths.sum(1) + (samples.input_rows[used, TEXT] >= 0)).astype(np.float64)

    per_position = 2 * (4 * width**2 + 2 * width * ffn)
    encoder = (model.num_layers - 1) * (per_position * positions.sum() + 4 * width * np.square(positions).sum())
    read = _read_positions(config, samples)[used]  # the last layer is computed where something reads it
    keys_and_values = 4 * width**2
    encoder += keys_and_values * positions.sum() + ((per_position - keys_and_values) + 4 * width * positions) @ read

    written_text = np.where(samples.writes_text, samples.text_target_length + 1, 0)[used]
    written_codes = np.where(samples.writes_image, model.num_image_codes, 0)[used]
    decoders = 0.0
    for layers, outputs, written in (
        (model.text_decoder_layers, model.vocab_size, written_text),
        (model.image_decoder_layers, model.image_codebook_size, written_codes),
    ):
        memory = positions * (written > 0)
        rows = written.astype(np.float64)
        attention = 4 * width * (np.square(rows) + rows * memory).sum()
        projections = 2 * (6 * width**2 + 2 * width * ffn) * rows.sum() + 4 * width**2 * memory.sum()
        decoders += layers * (projections + attention) + 2 * rows.sum() * width * outputs

    p, draw = config.tasks.mask_probability, samples.draw[used]
    words = float(num_masked(lengths[draw == MLM, TEXT], p).sum())
    regions = float(num_masked(lengths[draw == MVM, IMAGE], p).sum())
    utterances = lengths[draw == MAM, AUDIO]
    frames = num_masked_frames(utterances, p).astype(np.float64)
    num_labels = len(config.tasks.labels.names) if config.tasks.labels else 0
    heads = 2 * (
        words * (width**2 + width * model.vocab_size)
        + regions * width * (model.image_feature_dim + model.image_num_classes)
        + frames.sum() * width * 2 * frame_dim
        + (frames * utterances).sum() * frame_dim
        + float((draw == MATCHING).sum()) * width * NUM_CASES
        + float((draw == LABELS).sum()) * (width**2 + width * num_labels)
    )
    embeddings = 2.0 * width * (
        lengths[:, IMAGE].sum() * (model.image_feature_dim + 7) + lengths[:, AUDIO].sum() * frame_dim
    )
    return StepFlops(float(embeddings), float(encoder), float(decoders), float(heads))


def _read_positions(config: Config, samples: PlannedSamples) -> np.ndarray:
    """float64 [B]: positions of the encoder's output that a head or a decoder reads."""
    p, lengths = config.tasks.mask_probability, samples.input_lengths
    positions = 1 + lengths.sum(1) + (samples.input_rows[:, TEXT] >= 0)
    read = np.where(samples.writes_text | samples.writes_image, positions, 0)
    read = np.where(samples.draw == MLM, num_masked(lengths[:, TEXT], p), read)
    read = np.where(samples.draw == MVM, num_masked(lengths[:, IMAGE], p), read)
    read = np.where(samples.draw == MAM, num_masked_frames(lengths[:, AUDIO], p), read)
    return np.where((samples.draw == MATCHING) | (samples.draw == LABELS), 1, read).astype(np.float64)
