"""Inputs of layers and decoders other than hidden states."""

from dataclasses import dataclass

import torch

from opt_ds.ops.movable import Movable
from opt_ds.ops.sequences import Sequences


@dataclass
class OutputPositions(Movable):
    """The output positions: packed positions whose encoding a head or decoder uses.

    The encoder's last layer is computed at these positions only.
    """

    index: torch.Tensor  # int64 [R], ascending
    sequences: Sequences  # the output positions grouped by sample


@dataclass
class DecoderBatch(Movable):
    """Teacher-forced decoder inputs and targets, and the encoder positions that the decoder attends to."""

    input_ids: torch.Tensor  # int64 [w]; −1 marks the start of an image
    target_ids: torch.Tensor  # int64 [w]
    positions: torch.Tensor  # int64 [w]
    sequences: Sequences
    memory_index: torch.Tensor  # int64 [m], packed positions of the samples with decoder targets
    memory: Sequences
    query_groups: Sequences | None = None  # rows grouped by memory sequence, where several sequences share one
