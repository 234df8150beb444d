"""The boundaries of the sequences in a packed tensor: the one description that every attention kernel reads."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch


@dataclass
class Sequences:
    """S sequences concatenated in a packed tensor of T rows, without padding.

    `cu_seqlens` is int32 [S + 1]: the first row of each sequence, and T. `min_length`, `max_length`, `total` and
    `host_lengths` (int64 [S]) are on the host, so reading them does not synchronise with the device. `sample_index` is
    int32 [S]: the global sample indices (positions in the global batch), which key the dropout. None: 0, 1, 2, …
    """

    cu_seqlens: torch.Tensor
    min_length: int
    max_length: int
    total: int
    host_lengths: np.ndarray
    sample_index: torch.Tensor | None = None

    @classmethod
    def from_lengths(
        cls,
        lengths: np.ndarray | list[int],
        device: torch.device | str = "cpu",
        sample_index: np.ndarray | list[int] | None = None,
    ) -> "Sequences":
        """Build from the lengths [S] and, optionally, the global sample indices [S]; put the tensors on `device`."""
        lengths = np.asarray(lengths, dtype=np.int64)
        places = None if sample_index is None else torch.from_numpy(np.asarray(sample_index, dtype=np.int32)).to(device)
        cu = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
        return cls(cu, int(lengths.min(initial=2**31)), int(lengths.max(initial=0)), int(lengths.sum()), lengths, places)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Sequences":
        """Return a copy whose tensors are on the device."""
        sample_index = None if self.sample_index is None else self.sample_index.to(device, non_blocking=non_blocking)
        return replace(
            self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking), sample_index=sample_index
        )

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Lengths of the sequences, int64 [S]."""
        return torch.diff(self.cu_seqlens).long()

    @cached_property
    def valid(self) -> torch.Tensor:
        """Which positions of the padded layout hold a row, bool [S, L]."""
        return torch.arange(self.max_length, device=self.cu_seqlens.device)[None, :] < self.lengths[:, None]

    @cached_property
    def row_of_place(self) -> torch.Tensor:
        """Packed row of each padded position, int64 [S · L]; row 0 for padding."""
        place = torch.arange(self.max_length, device=self.cu_seqlens.device)[None, :]
        return torch.where(self.valid, self.cu_seqlens[:-1, None].long() + place, 0).reshape(-1)

    @cached_property
    def place_of_row(self) -> torch.Tensor:
        """Padded position, sequence · L + position, of each packed row; int64 [T]."""
        first = torch.arange(len(self), device=self.cu_seqlens.device) * self.max_length - self.cu_seqlens[:-1].long()
        shift = torch.repeat_interleave(first, self.lengths, output_size=self.total)
        return shift + torch.arange(self.total, device=self.cu_seqlens.device)

    @cached_property
    def sample_index_or_range(self) -> torch.Tensor:
        """Global sample indices, or 0, 1, 2, … if there are none; int32 [S]."""
        if self.sample_index is not None:
            return self.sample_index
        return torch.arange(len(self), dtype=torch.int32, device=self.cu_seqlens.device)

    @cached_property
    def row_keys(self) -> torch.Tensor:
        """Global sample index and position of each packed row, int32 [T, 2]. They key the row's dropout."""
        lengths = self.lengths
        first = torch.repeat_interleave(self.cu_seqlens[:-1], lengths, output_size=self.total)
        sample_index = torch.repeat_interleave(self.sample_index_or_range, lengths, output_size=self.total)
        row = torch.arange(self.total, dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.stack([sample_index, row - first], dim=1)

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Convert packed rows [T, …] to the padded layout [S, L, …].

        Padding repeats row 0, so the caller must mask it.
        """
        return rows.index_select(0, self.row_of_place).unflatten(0, (len(self), self.max_length))

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Convert the padded layout [S, L, …] to packed rows [T, …]."""
        return padded.flatten(0, 1).index_select(0, self.place_of_row)
