"""Floating-point operations of a planned step: what the model has to compute, whatever the kernels and the padding.

A multiplication and an addition are two operations. Counted are matrix products, attention's among them; causal attention is
counted in full, as is usual. Backward takes twice the forward pass, except for projections of raw features, whose input needs
no gradient. The tasks count their decoders and heads themselves (`DataTask.cost`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from opt_ds.config import Config, ModelConfig
from opt_ds.data.planned_samples import PlannedSamples
from opt_ds.data.task import DataTask


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
    return _summed(_forward_flops(config, _tasks(config), samples)[0])


def sample_flops(config: Config, samples: PlannedSamples) -> np.ndarray:
    """float64 [B]: operations of training once on each sample."""
    return sample_and_step_flops(config, _tasks(config), samples)[0]


def _tasks(config: Config) -> list[DataTask]:
    return [unit(config) for unit in config.tasks.units.values()]


def sample_and_step_flops(
    config: Config, tasks: Iterable[DataTask], samples: PlannedSamples
) -> tuple[np.ndarray, float, np.ndarray]:
    """float64 [B], operations of training once on each sample; on all of them; int64 [B], positions of the decoders."""
    parts, decoder_positions = _forward_flops(config, tasks, samples)
    embeddings, encoder, decoders, heads = parts
    return 2 * embeddings + 3 * (encoder + decoders + heads), _summed(parts).total, decoder_positions


def decoder_flops(
    model: ModelConfig, layers: int, outputs: int, num_items: np.ndarray, memory_positions: np.ndarray
) -> np.ndarray:
    """float64 [n]: forward operations of a decoder that writes these items, each sequence to its encoder positions."""
    width, rows = model.hidden_size, num_items.astype(np.float64)
    attention = 4 * width * (np.square(rows) + rows * memory_positions)
    projections = 2 * (6 * width**2 + 2 * width * model.ffn_size) * rows + 4 * width**2 * memory_positions
    return layers * (projections + attention) + 2 * rows * width * outputs


def _summed(parts: tuple[np.ndarray, ...]) -> StepFlops:
    return StepFlops(*(float(part.sum()) for part in parts))


def _forward_flops(
    config: Config, tasks: Iterable[DataTask], samples: PlannedSamples
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """float64 [B] each: operations of embeddings, encoder, decoders and heads; int64 [B]: positions of the decoders.

    A sample that nothing is learned from has no operations. All are whole numbers far below 2^53, so that no order of adding
    them rounds.
    """
    model = config.model
    _, regions, frames = samples.input_lengths.T
    width, ffn, used = model.hidden_size, model.ffn_size, samples.task >= 0
    positions = (used * samples.input_positions()).astype(np.float64)
    decoders, heads = np.zeros(len(samples)), np.zeros(len(samples))
    output_positions, decoder_positions = np.zeros(len(samples), np.int64), np.zeros(len(samples), np.int64)
    for task in tasks:
        cost = task.cost(samples, positions)
        decoders += cost.decoder_flops
        heads += cost.head_flops
        output_positions += cost.output_positions
        decoder_positions += cost.decoder_positions

    per_position, keys_and_values = 2 * (4 * width**2 + 2 * width * ffn), 4 * width**2
    squares = 4 * width * positions  # of attention, for each position
    whole_layer, last_layer = per_position + squares, per_position - keys_and_values + squares
    encoder = (model.num_layers - 1) * positions * whole_layer + keys_and_values * positions
    encoder += last_layer * output_positions  # computed where something reads it
    frame_dim = model.audio_stack * model.audio_feature_dim
    embeddings = 2.0 * width * used * (regions * (model.image_feature_dim + 7) + frames * frame_dim)
    return (embeddings, encoder, decoders, heads), decoder_positions
