"""The packed batch: samples laid end to end, `[CLS] text [SEP] regions frames`, no padding, and where each task reads.

Legend: T packed positions of S sequences; n text rows, r region rows, a frame rows (over all sequences);
`*_index` are packed positions, int64.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opt_ds.config import ModelConfig
from opt_ds.data.samples import Sample, given
from opt_ds.ops.sequences import Sequences
from opt_ds.store.schema import TokenizerDescription


@dataclass
class _Movable:
    """Moves its tensors, and what holds tensors, to a device."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        def moved(value: Any) -> Any:
            if isinstance(value, (torch.Tensor, _Movable, Sequences)):
                return value.to(device, non_blocking=non_blocking)
            return value

        return dataclasses.replace(self, **{f.name: moved(getattr(self, f.name)) for f in dataclasses.fields(self)})


@dataclass
class EncoderInputs(_Movable):
    """Everything that the embedders and the encoder need."""

    sequences: Sequences
    slots: torch.Tensor  # int64 [S], places in the global batch
    token_ids: torch.Tensor  # int64 [n], with [CLS] and [SEP]
    token_positions: torch.Tensor  # int64 [n]
    token_index: torch.Tensor  # int64 [n]
    region_features: torch.Tensor  # float16 [r, v], original also where masked
    region_boxes: torch.Tensor  # float32 [r, 7]
    region_masked: torch.Tensor  # bool [r]
    region_index: torch.Tensor  # int64 [r]
    frames: torch.Tensor  # float16 [a, stack · v], original also where masked
    frame_positions: torch.Tensor  # int64 [a]
    frame_masked: torch.Tensor  # bool [a]
    frame_index: torch.Tensor  # int64 [a]
    gather_index: torch.Tensor  # int64 [T]: row of (text rows, region rows, frame rows) at each packed position

    @property
    def cls_index(self) -> torch.Tensor:
        return self.sequences.cu_seqlens[:-1].long()


@dataclass
class ReadRows(_Movable):
    """Packed positions whose encoding some head or decoder reads: the encoder's last layer is computed at no others."""

    index: torch.Tensor  # int64 [R], ascending
    sequences: Sequences  # of each sample


@dataclass
class MaskedTokens(_Movable):
    index: torch.Tensor  # int64 [m], packed positions
    targets: torch.Tensor  # int64 [m]


@dataclass
class MaskedRegions(_Movable):
    index: torch.Tensor  # int64 [m], packed positions
    rows: torch.Tensor  # int64 [m], region rows
    labels: torch.Tensor  # int64 [m], the detector's class


@dataclass
class MaskedFrames(_Movable):
    """Masked frames utterance by utterance, beside all frames of their utterance (the contrast)."""

    index: torch.Tensor  # int64 [m], packed positions
    rows: torch.Tensor  # int64 [m], frame rows
    places: torch.Tensor  # int64 [m], place of the frame in its utterance
    sequences: Sequences  # the masked frames of each utterance
    utterance_rows: torch.Tensor  # int64 [k], frame rows of whole utterances
    utterances: Sequences


@dataclass
class Written(_Movable):
    """What a decoder is to write (teacher-forced), and the encoder positions that it looks at."""

    input_ids: torch.Tensor  # int64 [w]; for images the beginning is −1
    target_ids: torch.Tensor  # int64 [w]
    positions: torch.Tensor  # int64 [w]
    sequences: Sequences
    memory_index: torch.Tensor  # int64 [m], packed positions of the samples that write
    memory: Sequences
    readers: Sequences | None = None  # written rows by the memory that they look at, where several sequences share one


@dataclass
class Judged(_Movable):
    index: torch.Tensor  # int64 [j], packed positions of [CLS]
    cases: torch.Tensor  # int64 [j]


@dataclass
class Labelled(_Movable):
    index: torch.Tensor  # int64 [j], packed positions of [CLS]
    targets: torch.Tensor  # float32 [j, c], 0 … 1 for each name of the label head; [0, 0] where no sample is labelled


@dataclass
class PackedBatch(_Movable):
    """One micro-batch. Every part is always there; a part without work has length 0."""

    inputs: EncoderInputs
    read: ReadRows
    masked_tokens: MaskedTokens
    masked_regions: MaskedRegions
    masked_frames: MaskedFrames
    written_text: Written
    written_image: Written
    judged: Judged
    labelled: Labelled
    sample_names: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        return len(self.inputs.sequences)

    @property
    def num_tokens(self) -> int:
        """Positions of encoder and decoders."""
        return self.inputs.sequences.total + self.written_text.sequences.total + self.written_image.sequences.total

    def pin_memory(self) -> "PackedBatch":
        """Page-locked copies, for asynchronous transfer."""
        return map_tensors(self, torch.Tensor.pin_memory)


def map_tensors(value: Any, function: Any) -> Any:
    """The same batch, or part of one, with the function applied to each of its tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (_Movable, Sequences)):
        fields = {f.name: map_tensors(getattr(value, f.name), function) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


class Packer:
    """Packs samples; knows the special tokens and the widths of empty parts."""

    def __init__(self, tokenizer: TokenizerDescription, model: ModelConfig) -> None:
        self.cls_id, self.sep_id = tokenizer.cls_id, tokenizer.sep_id
        self.image_feature_dim, self.frame_dim = model.image_feature_dim, model.audio_stack * model.audio_feature_dim

    def pack(self, samples: list[Sample]) -> PackedBatch:
        """One micro-batch of the samples, in their order."""
        layout = _Layout(samples)
        tokens, regions, frames = (
            _masked_tokens(samples, layout), _masked_regions(samples, layout), _masked_frames(samples, layout)
        )  # fmt: skip
        text, image = self._written(samples, layout, "written_text"), self._written(samples, layout, "written_codes")
        judged, labelled = _judged(samples, layout), _labelled(samples, layout)
        readers = [part.index for part in (tokens, regions, frames, judged, labelled)]
        readers += [text.memory_index, image.memory_index]
        return PackedBatch(
            inputs=self._inputs(samples, layout),
            read=_read_rows(samples, layout, readers),
            masked_tokens=tokens,
            masked_regions=regions,
            masked_frames=frames,
            written_text=text,
            written_image=image,
            judged=judged,
            labelled=labelled,
            sample_names=tuple(sample.name for sample in samples),
        )

    def _inputs(self, samples: list[Sample], layout: "_Layout") -> EncoderInputs:
        tokens = [
            np.array([self.cls_id]) if s.token_ids is None else np.concatenate([[self.cls_id], s.token_ids, [self.sep_id]])
            for s in samples
        ]
        regions, frames = [s for s in samples if s.region_features is not None], [s for s in samples if s.frames is not None]
        token_index, region_index, frame_index = (layout.index_of(modality) for modality in range(3))
        gather = np.empty(layout.total, dtype=np.int64)
        gather[np.concatenate([token_index, region_index, frame_index])] = np.arange(layout.total)
        return EncoderInputs(
            sequences=Sequences.from_lengths(layout.lengths.sum(1), slots=[s.slot for s in samples]),
            slots=_long([s.slot for s in samples]),
            token_ids=_join(tokens, np.int64),
            token_positions=_join([np.arange(len(t)) for t in tokens], np.int64),
            token_index=torch.from_numpy(token_index),
            region_features=_join([given(s.region_features) for s in regions], np.float16, (self.image_feature_dim,)),
            region_boxes=_join([given(s.region_boxes) for s in regions], np.float32, (7,)),
            region_masked=_join([_or_none_masked(s.region_masked, given(s.region_features)) for s in regions], bool),
            region_index=torch.from_numpy(region_index),
            frames=_join([given(s.frames) for s in frames], np.float16, (self.frame_dim,)),
            frame_positions=_join([np.arange(len(given(s.frames))) for s in frames], np.int64),
            frame_masked=_join([_or_none_masked(s.frame_masked, given(s.frames)) for s in frames], bool),
            frame_index=torch.from_numpy(frame_index),
            gather_index=torch.from_numpy(gather),
        )

    def _written(self, samples: list[Sample], layout: "_Layout", name: str) -> Written:
        writing = [i for i, s in enumerate(samples) if getattr(s, name) is not None]
        targets = [getattr(samples[i], name) for i in writing]
        begin = -1
        if name == "written_text":  # BOS is [CLS]; EOS is [SEP], and it is learned where the text ends
            begin = self.cls_id
            targets = [
                np.append(target, self.sep_id) if samples[i].text_ends else target
                for i, target in zip(writing, targets, strict=True)
            ]
        memory = [np.arange(layout.starts[i], layout.starts[i + 1]) for i in writing]
        return Written(
            input_ids=_join([np.append(begin, target[:-1]) for target in targets], np.int64),
            target_ids=_join(targets, np.int64),
            positions=_join([np.arange(len(target)) for target in targets], np.int64),
            sequences=Sequences.from_lengths([len(target) for target in targets], slots=[samples[i].slot for i in writing]),
            memory_index=_join(memory, np.int64),
            memory=Sequences.from_lengths([len(positions) for positions in memory]),
        )


class _Layout:
    """Where each sample's text, region and frame rows lie in the packed order."""

    def __init__(self, samples: list[Sample]) -> None:
        self.lengths = np.array(
            [
                (
                    1 if s.token_ids is None else len(s.token_ids) + 2,
                    0 if s.region_features is None else len(s.region_features),
                    0 if s.frames is None else len(s.frames),
                )
                for s in samples
            ],
            dtype=np.int64,
        ).reshape(-1, 3)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths.sum(1))])
        self.total = int(self.starts[-1])
        self.first = self.starts[:-1, None] + np.concatenate(
            [np.zeros((len(samples), 1), np.int64), np.cumsum(self.lengths[:, :2], axis=1)], axis=1
        )  # [S, 3], first packed position of each modality
        self.row_start = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(self.lengths, axis=0)])  # [S + 1, 3]

    def index_of(self, modality: int) -> np.ndarray:
        """int64, packed position of each of the modality's rows."""
        shift = np.repeat(self.first[:, modality] - self.row_start[:-1, modality], self.lengths[:, modality])
        return shift + np.arange(len(shift))


def _read_rows(samples: list[Sample], layout: _Layout, readers: list[torch.Tensor]) -> ReadRows:
    index = np.unique(torch.cat(readers).numpy())
    lengths = np.diff(np.searchsorted(index, layout.starts))
    return ReadRows(torch.from_numpy(index), Sequences.from_lengths(lengths, slots=[s.slot for s in samples]))


def _masked_tokens(samples: list[Sample], layout: _Layout) -> MaskedTokens:
    who = [i for i, s in enumerate(samples) if s.mlm_masked is not None]
    places = [np.flatnonzero(given(samples[i].mlm_masked)) for i in who]
    return MaskedTokens(
        index=_join([layout.first[i, 0] + 1 + p for i, p in zip(who, places, strict=True)], np.int64),
        targets=_join([given(samples[i].mlm_targets)[p] for i, p in zip(who, places, strict=True)], np.int64),
    )


def _masked_regions(samples: list[Sample], layout: _Layout) -> MaskedRegions:
    who = [i for i, s in enumerate(samples) if s.predict_regions]
    places = [np.flatnonzero(given(samples[i].region_masked)) for i in who]
    pairs = list(zip(who, places, strict=True))
    return MaskedRegions(
        index=_join([layout.first[i, 1] + p for i, p in pairs], np.int64),
        rows=_join([layout.row_start[i, 1] + p for i, p in pairs], np.int64),
        labels=_join([given(samples[i].region_labels)[p] for i, p in pairs], np.int64),
    )


def _masked_frames(samples: list[Sample], layout: _Layout) -> MaskedFrames:
    who = [i for i, s in enumerate(samples) if s.predict_frames]
    places = [np.flatnonzero(given(samples[i].frame_masked)) for i in who]
    pairs = list(zip(who, places, strict=True))
    return MaskedFrames(
        index=_join([layout.first[i, 2] + p for i, p in pairs], np.int64),
        rows=_join([layout.row_start[i, 2] + p for i, p in pairs], np.int64),
        places=_join(places, np.int64),
        sequences=Sequences.from_lengths([len(p) for p in places]),
        utterance_rows=_join([np.arange(layout.row_start[i, 2], layout.row_start[i + 1, 2]) for i in who], np.int64),
        utterances=Sequences.from_lengths([layout.lengths[i, 2] for i in who]),
    )


def _judged(samples: list[Sample], layout: _Layout) -> Judged:
    who = [i for i, s in enumerate(samples) if s.case >= 0]
    return Judged(index=_long(layout.starts[who]), cases=_long([samples[i].case for i in who]))


def _labelled(samples: list[Sample], layout: _Layout) -> Labelled:
    who = [i for i, s in enumerate(samples) if s.label_targets is not None]
    targets = np.stack([given(samples[i].label_targets) for i in who]) if who else np.empty((0, 0))
    return Labelled(index=_long(layout.starts[who]), targets=torch.from_numpy(targets.astype(np.float32)))


def _or_none_masked(masked: np.ndarray | None, items: np.ndarray) -> np.ndarray:
    return np.zeros(len(items), dtype=bool) if masked is None else masked


def _join(parts: list[np.ndarray], dtype: Any, width: tuple[int, ...] = ()) -> torch.Tensor:
    """Return all rows end to end. PyTorch aligns its memory as the store does; NumPy's, 16 bytes off, halves the rate of a copy."""
    shape = (sum(map(len, parts)), *(parts[0].shape[1:] if parts else width))
    joined = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype)
    if parts:
        np.concatenate(parts, out=joined.numpy(), casting="same_kind")
    return joined


def _long(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64).reshape(-1))
