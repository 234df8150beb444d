"""The packed batch, and the output positions of each task.

Samples are concatenated without padding, each as the rows of its modalities (see `opt_ds.data.layout`).

Legend: T packed positions of S sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opt_ds.config import Config
from opt_ds.data.layout import Layout, as_long, join
from opt_ds.data.modality import ModalityBatch, modalities_of
from opt_ds.data.sample import Sample
from opt_ds.data.task import BatchPart, tasks_of
from opt_ds.nn.inputs import DecoderBatch, OutputPositions
from opt_ds.ops.movable import Movable, map_tensors
from opt_ds.ops.sequences import Sequences
from opt_ds.store.schema import TokenizerDescription


@dataclass
class EncoderInputs(Movable):
    """Inputs of the embedders and the encoder."""

    sequences: Sequences
    sample_indices: torch.Tensor  # int64 [S], global sample indices
    parts: dict[int, ModalityBatch]  # modality -> its rows
    gather_index: torch.Tensor  # int64 [T], for each packed position its row in the modalities' rows, concatenated

    @property
    def cls_index(self) -> torch.Tensor:
        """Packed positions of [CLS], int64 [S]."""
        return self.sequences.cu_seqlens[:-1].long()


@dataclass
class PackedBatch(Movable):
    """One micro-batch. All parts are present; a part without work has length 0."""

    inputs: EncoderInputs
    read: OutputPositions
    parts: dict[str, BatchPart]  # task -> its part
    sample_names: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.inputs.sequences)

    @property
    def num_tokens(self) -> int:
        """Number of positions of the encoder and the decoders."""
        return self.inputs.sequences.total + sum(part.num_decoder_positions for part in self.parts.values())

    def pin_memory(self) -> "PackedBatch":
        """Return a copy in page-locked memory, for asynchronous transfer."""
        return map_tensors(self, torch.Tensor.pin_memory)


class Packer:
    """Packs samples into batches. It holds the modalities, the tasks and the special tokens."""

    def __init__(self, config: Config, tokenizer: TokenizerDescription) -> None:
        self.cls_id, self.sep_id = tokenizer.cls_id, tokenizer.sep_id
        self._modalities = modalities_of(config.model)
        self._tasks = list(tasks_of(config).values())

    def pack(self, samples: list[Sample]) -> PackedBatch:
        """Return one micro-batch of the samples, in their order."""
        num_rows = [[unit.num_rows(sample.items.get(unit.number)) for unit in self._modalities] for sample in samples]
        lengths = np.array(num_rows, np.int64).reshape(-1, len(self._modalities))
        layout = Layout(lengths, self.cls_id, self.sep_id)
        parts = {task.name: part for task in self._tasks if (part := task.collate(samples, layout)) is not None}
        return PackedBatch(
            inputs=self._inputs(samples, layout),
            read=_output_positions(samples, layout, [index for part in parts.values() for index in part.output_index]),
            parts=parts,
            sample_names=tuple(sample.name for sample in samples),
        )

    def _inputs(self, samples: list[Sample], layout: Layout) -> EncoderInputs:
        parts = {
            modality.number: modality.collate([sample.items.get(modality.number) for sample in samples], layout)
            for modality in self._modalities
        }
        gather = np.empty(layout.total, dtype=np.int64)
        gather[np.concatenate([part.index.numpy() for part in parts.values()])] = np.arange(layout.total)
        return EncoderInputs(
            sequences=Sequences.from_lengths(layout.lengths.sum(1), sample_index=[s.index for s in samples]),
            sample_indices=as_long([s.index for s in samples]),
            parts=parts,
            gather_index=torch.from_numpy(gather),
        )


def _output_positions(samples: list[Sample], layout: Layout, output_indices: list[torch.Tensor]) -> OutputPositions:
    index = np.unique(torch.cat([as_long([]), *output_indices]).numpy())
    lengths = np.diff(np.searchsorted(index, layout.starts))
    return OutputPositions(
        torch.from_numpy(index), Sequences.from_lengths(lengths, sample_index=[s.index for s in samples])
    )


def decoder_targets(
    samples: Sequence[Sample],
    layout: Layout,
    targets: Mapping[int, np.ndarray],
    begin_id: int,
) -> DecoderBatch:
    """Return the teacher-forced targets of a decoder.

    Args:
        samples: The samples of the batch.
        layout: Their layout.
        targets: Index of a sample in the batch -> its int64 target items, including the end; ascending.
        begin_id: The input before the first item.

    Returns:
        The decoder's part of the batch.
    """
    memory = [np.arange(layout.starts[i], layout.starts[i + 1]) for i in targets]
    items = list(targets.values())
    return DecoderBatch(
        input_ids=join([np.append(begin_id, target[:-1]) for target in items], np.int64),
        target_ids=join(items, np.int64),
        positions=join([np.arange(len(target)) for target in items], np.int64),
        sequences=Sequences.from_lengths(
            [len(target) for target in items], sample_index=[samples[i].index for i in targets]
        ),
        memory_index=join(memory, np.int64),
        memory=Sequences.from_lengths([len(positions) for positions in memory]),
    )
