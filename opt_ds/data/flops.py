"""Floating-point operations of a step: the work of the model itself, independent of kernels and padding.

A multiplication and an addition count as two operations. Matrix products are counted, including those of attention;
causal attention is counted in full, as is usual. The backward pass takes twice the forward pass, except for projections
of raw features, whose input needs no gradient. The tasks count their own decoders and heads (`DataTask.add_cost`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from opt_ds.config import Config, ModelConfig
from opt_ds.data.modality import modalities_of
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import DataTask, TaskCost, tasks_of


@dataclass(frozen=True)
class StepFlops:
    """Forward operations of a set of samples, by part of the model."""

    embeddings: float
    encoder: float
    decoders: float
    heads: float

    @property
    def forward(self) -> float:
        """Operations of a forward pass."""
        return self.embeddings + self.encoder + self.decoders + self.heads

    @property
    def total(self) -> float:
        """Operations of a forward and a backward pass."""
        return 3 * self.forward - self.embeddings


def step_flops(config: Config, samples: StepSamples) -> StepFlops:
    """Return the operations of training once on these samples."""
    return _summed(_forward_flops(config, tasks_of(config).values(), samples)[0])


def sample_and_step_flops(
    config: Config, tasks: Iterable[DataTask], samples: StepSamples
) -> tuple[np.ndarray, float, np.ndarray]:
    """Return the operations of training once on each sample and on all of them.

    The results are float64 [B], the total, and the decoder positions, int64 [B].
    """
    parts, decoder_positions = _forward_flops(config, tasks, samples)
    embeddings, encoder, decoders, heads = parts
    return 2 * embeddings + 3 * (encoder + decoders + heads), _summed(parts).total, decoder_positions


def decoder_flops(
    model: ModelConfig, layers: int, outputs: int, num_items: np.ndarray, memory_positions: np.ndarray
) -> np.ndarray:
    """Return the forward operations of a decoder for each sequence, float64 [n].

    Args:
        model: The model's configuration.
        layers: Number of decoder layers.
        outputs: Number of output classes.
        num_items: int64 [n], target items.
        memory_positions: float64 [n], encoder positions that the decoder attends to.

    Returns:
        float64 [n].
    """
    width, rows = model.hidden_size, num_items.astype(np.float64)
    attention = 4 * width * (np.square(rows) + rows * memory_positions)
    projections = 2 * (6 * width**2 + 2 * width * model.ffn_size) * rows + 4 * width**2 * memory_positions
    return layers * (projections + attention) + 2 * rows * width * outputs


def _summed(parts: tuple[np.ndarray, ...]) -> StepFlops:
    return StepFlops(*(float(part.sum()) for part in parts))


def _forward_flops(
    config: Config, tasks: Iterable[DataTask], samples: StepSamples
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Return operations of embeddings, encoder, decoders and heads, float64 [B] each.

    The decoder positions, int64 [B], are returned too.

    A sample without a task has no operations. All values are integers far below 2^53, so their sum is exact in any
    order.
    """
    model = config.model
    width, ffn, used = model.hidden_size, model.ffn_size, samples.task >= 0
    positions = (used * samples.input_positions()).astype(np.float64)
    cost = TaskCost.none(len(samples))
    for task in tasks:
        task.add_cost(samples, positions, cost)

    per_position, keys_and_values = 2 * (4 * width**2 + 2 * width * ffn), 4 * width**2
    squares = 4 * width * positions  # of attention, per position
    full_layer, last_layer = per_position + squares, per_position - keys_and_values + squares
    encoder = (model.num_layers - 1) * positions * full_layer + keys_and_values * positions
    encoder += last_layer * cost.output_positions  # the last layer is computed only at positions that are used
    projected = [
        samples.input_lengths[:, modality.number] * modality.projected_dim
        for modality in modalities_of(model)
        if modality.projected_dim
    ]
    embeddings = 2.0 * width * used * sum(projected)
    return (embeddings, encoder, cost.decoder_flops, cost.head_flops), cost.decoder_positions
