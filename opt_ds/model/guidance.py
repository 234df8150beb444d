"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) of a decoder.

Legend: b sequences, u packed rows of the encoder's output, v outputs.
"""

import torch

from opt_ds.nn.autoregressive import AutoregressiveDecoder
from opt_ds.nn.transformer import LayerCache
from opt_ds.ops.sequences import Sequences


class GuidedDecoder:
    """A decoder whose scores are unconditional + scale · (conditional − unconditional).

    Both passes decode the same items, each over its own memory and with its own caches. Of the caches of `start`, the first
    half is that of the conditional pass. `opt_ds.model.generation.write` generates with it as with any decoder.
    """

    def __init__(self, decoder: AutoregressiveDecoder, null_ue: torch.Tensor, scale: float) -> None:
        """Guide a decoder.

        Args:
            decoder: The decoder.
            null_ue: The encoder's output [u, e] for one sample without input.
            scale: The scale. 0: the input has no effect. 1: the decoder's own scores, apart from rounding.
        """
        self._decoder, self._null_ue, self._scale = decoder, null_ue, scale
        self.num_positions = decoder.num_positions

    def start(self, memory_ue: torch.Tensor, memory: Sequences, length: int | None = None) -> list[LayerCache]:
        """Return empty caches of both passes, one decoded sequence per memory sequence."""
        count = len(memory)
        nothing = Sequences.from_lengths([len(self._null_ue)] * count, device=memory_ue.device)
        unconditional = self._decoder.start(self._null_ue.repeat(count, 1), nothing, length)
        return [*self._decoder.start(memory_ue, memory, length), *unconditional]

    def decode(self, ids_b: torch.Tensor, position: int, caches: list[LayerCache]) -> torch.Tensor:
        """Return the guided scores [b, v], float32, of the items after `ids_b`, which are at `position`."""
        half = len(caches) // 2
        conditional_bv = self._decoder.decode(ids_b, position, caches[:half]).float()
        unconditional_bv = self._decoder.decode(ids_b, position, caches[half:]).float()
        return unconditional_bv + self._scale * (conditional_bv - unconditional_bv)
