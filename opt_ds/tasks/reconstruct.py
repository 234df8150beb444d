"""Modality-level reconstruction: the text decoder writes the whole text (DTR), the image decoder the image codes (DIR).

−Σ log P(item | items before, encoder's output), teacher-forced. The text begins with [CLS]; its end, [SEP], is counted.
"""

import torch

from opt_ds.data.batch import Written
from opt_ds.model.decoders import AutoregressiveDecoder
from opt_ds.tasks.base import LossTerm


def reconstruction_term(decoder: AutoregressiveDecoder, written: Written, hidden_te: torch.Tensor) -> LossTerm:
    """The decoder's summed cross-entropy over everything that is to be written."""
    loss, correct = decoder(written, hidden_te)
    return LossTerm(loss, float(len(written.target_ids)), {"correct": correct})
