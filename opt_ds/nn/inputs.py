"""What layers and decoders are given beside hidden states."""

from dataclasses import dataclass

import torch

from opt_ds.ops.movable import Movable
from opt_ds.ops.sequences import Sequences


@dataclass
class ReadRows(Movable):
    """Packed positions whose encoding some head or decoder reads: the encoder's last layer is computed at no others."""

    index: torch.Tensor  # int64 [R], ascending
    sequences: Sequences  # of each sample


@dataclass
class Written(Movable):
    """What a decoder is to write (teacher-forced), and the encoder positions that it looks at."""

    input_ids: torch.Tensor  # int64 [w]; for images the beginning is −1
    target_ids: torch.Tensor  # int64 [w]
    positions: torch.Tensor  # int64 [w]
    sequences: Sequences
    memory_index: torch.Tensor  # int64 [m], packed positions of the samples that write
    memory: Sequences
    readers: Sequences | None = None  # written rows by the memory that they look at, where several sequences share one
