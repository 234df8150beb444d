"""A trained model at work on samples: encodes them, writes text and image codes, scores pairs and texts.

Legend: u packed rows of the encoder's output over all samples.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from opt_ds.config import Config
from opt_ds.data.batch import PackedBatch, Packer, Written
from opt_ds.data.samples import Sample
from opt_ds.model.generation import DecodingConfig, write
from opt_ds.model.opt import OPT
from opt_ds.ops.sequences import Sequences
from opt_ds.store.schema import TokenizerDescription
from opt_ds.store.tokenizer import load_tokenizer

_POSITIONS_PER_BATCH = 8192


class ModelRunner:
    """One model and the tokenizer of its words. The model is put into inference mode."""

    def __init__(
        self, model: OPT, config: Config, tokenizer: TokenizerDescription, tokenizer_folder: Path, device: torch.device | str
    ) -> None:
        self.model, self.config, self.device = model.eval(), config, torch.device(device)
        self.packer = Packer(tokenizer, config.model)
        self.tokenizer = load_tokenizer(tokenizer_folder)

    @torch.inference_mode()
    def batches(self, samples: Sequence[Sample]) -> Iterator[tuple[list[int], PackedBatch, torch.Tensor]]:
        """(places, batch, hidden_te): samples in batches of about equal length; places say which samples they are."""
        lengths = [_length(sample) for sample in samples]
        order = sorted(range(len(samples)), key=lambda i: lengths[i])
        start = 0
        while start < len(order):
            stop, positions = start, 0
            while stop < len(order) and (stop == start or positions + lengths[order[stop]] <= _POSITIONS_PER_BATCH):
                positions += lengths[order[stop]]
                stop += 1
            places = order[start:stop]
            batch = self.packer.pack([samples[i] for i in places]).to(self.device)
            yield places, batch, self.model.encode(batch.inputs)
            start = stop

    def cls_vectors(self, samples: Sequence[Sample]) -> np.ndarray:
        """The encoder's [CLS] of each sample; float32 [samples, e]."""
        cls_se = np.empty((len(samples), self.config.model.hidden_size), dtype=np.float32)
        for places, batch, hidden_te in self.batches(samples):
            cls_se[places] = hidden_te.index_select(0, batch.inputs.cls_index).float().cpu().numpy()
        return cls_se

    def write_text(self, samples: Sequence[Sample], options: DecodingConfig) -> list[str]:
        """What the text decoder writes for each sample, decoded to words."""
        texts = [""] * len(samples)
        for places, batch, hidden_te in self.batches(samples):
            begin, end = self.packer.cls_id, self.packer.sep_id
            written = write(
                self.model.text_decoder, hidden_te, batch.inputs.sequences, begin, end, options, keys=np.array(places)
            )
            for place, ids in zip(places, written, strict=True):
                texts[place] = self.decode_text(ids)
        return texts

    def write_codes(self, samples: Sequence[Sample], options: DecodingConfig) -> np.ndarray:
        """Image codes that the image decoder writes for each sample; int64 [samples, 64]."""
        codes = np.empty((len(samples), self.config.model.num_image_codes), dtype=np.int64)
        decoder = self.model.image_decoder
        for places, batch, hidden_te in self.batches(samples):
            written = write(decoder, hidden_te, batch.inputs.sequences, decoder.begin_id, None, options, keys=np.array(places))
            codes[places] = np.array(written)
        return codes

    @torch.inference_mode()
    def matching_scores(self, samples: Sequence[Sample]) -> np.ndarray:
        """The matching head's five scores of each sample; float32 [samples, 5]."""
        scores = np.empty((len(samples), 5), dtype=np.float32)
        for places, batch, hidden_te in self.batches(samples):
            cls_se = hidden_te.index_select(0, batch.inputs.cls_index)
            scores[places] = self.model.matching.score(cls_se).float().cpu().numpy()
        return scores

    @torch.inference_mode()
    def text_log_likelihood(self, samples: Sequence[Sample], texts: Sequence[np.ndarray]) -> np.ndarray:
        """log P(text | sample) for every pair, [SEP] included; float64 [samples, texts]. The texts are WordPiece ids.

        Each sample is encoded once; its keys and values serve all texts.
        """
        likelihood = np.empty((len(samples), len(texts)))
        begin, end = self.packer.cls_id, self.packer.sep_id
        ids, targets, text_sequences = _teacher_forced(texts, begin, end, self.device)
        positions = torch.cat([torch.arange(len(text) + 1) for text in texts]).to(self.device)
        for places, batch, hidden_te in self.batches(samples):
            starts = batch.inputs.sequences.cu_seqlens.tolist()
            for k, place in enumerate(places):
                scores = self._score_texts(ids, positions, text_sequences, hidden_te[starts[k] : starts[k + 1]])
                item = torch.log_softmax(scores.float(), -1).gather(1, targets[:, None]).squeeze(1)
                padded = text_sequences.pad(item) * text_sequences.valid
                likelihood[place] = padded.double().sum(1).cpu().numpy()
        return likelihood

    def _score_texts(
        self, ids: torch.Tensor, positions: torch.Tensor, texts: Sequences, memory_ue: torch.Tensor
    ) -> torch.Tensor:
        """Scores [w, vocabulary] of all texts against one sample's memory, which the texts share."""
        written = Written(
            ids,
            ids,
            positions,
            texts,
            memory_index=torch.arange(len(memory_ue), device=self.device),
            memory=Sequences.from_lengths([len(memory_ue)], device=self.device),
            readers=Sequences.from_lengths([texts.total], device=self.device),
        )
        return self.model.text_decoder(written, memory_ue)

    def decode_text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str), "one list of ids gives one text"
        return text


def _length(sample: Sample) -> int:
    parts = (sample.token_ids, sample.region_features, sample.frames)
    return 3 + sum(len(part) for part in parts if part is not None)


def _teacher_forced(
    texts: Sequence[np.ndarray], begin: int, end: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Sequences]:
    ids = torch.from_numpy(np.concatenate([np.append(begin, text) for text in texts]).astype(np.int64))
    targets = torch.from_numpy(np.concatenate([np.append(text, end) for text in texts]).astype(np.int64))
    sequences = Sequences.from_lengths([len(text) + 1 for text in texts], device=device)
    return ids.to(device), targets.to(device), sequences
