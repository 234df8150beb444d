"""Inference of a trained model on samples: encoding, generation of text and image codes, scores of pairs and texts.

With several ranks, each rank processes a part of the samples and receives the results of all of them. Callers need not
handle ranks.

Legend: u packed rows of the encoder's output over all samples.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opt_ds.abilities import ALIGN, GENERATE_IMAGES, LABEL, MATCH
from opt_ds.config import Config
from opt_ds.data.batch import PackedBatch, Packer
from opt_ds.data.matching import NUM_LABELS
from opt_ds.data.sample import Sample
from opt_ds.errors import UserError
from opt_ds.model.generation import DecodingConfig, write
from opt_ds.model.guidance import GuidedDecoder
from opt_ds.model.opt import OPT
from opt_ds.nn.inputs import DecoderBatch
from opt_ds.ops.sequences import Sequences
from opt_ds.store.schema import TokenizerDescription
from opt_ds.store.tokenizer import load_tokenizer
from opt_ds.tasks.reconstruct import code_targets

if TYPE_CHECKING:
    from opt_ds.training.distributed import ProcessGroup

_POSITIONS_PER_BATCH = 8192
_SCORES_AT_ONCE = 1 << 24  # elements, 64 MiB in fp32


class ModelRunner:
    """A model with its tokenizer. The model is put into evaluation mode."""

    def __init__(
        self,
        model: OPT,
        config: Config,
        tokenizer: TokenizerDescription,
        tokenizer_folder: Path,
        device: torch.device | str,
        group: "ProcessGroup | None" = None,
    ) -> None:
        """Prepare the model for inference.

        Args:
            model: The model.
            config: Its configuration.
            tokenizer: Description of its vocabulary.
            tokenizer_folder: Folder of its tokenizer.
            device: Device of the model.
            group: The ranks that process the samples together, each with the same model and the same calls. None: this
                process alone.
        """
        self.group = group if group and group.ranks.world_size > 1 else None
        self.model, self.config, self.device = model.eval(), config, torch.device(device)
        self.packer = Packer(config, tokenizer)
        self.tokenizer = load_tokenizer(tokenizer_folder)

    @torch.inference_mode()
    def batches(self, samples: Sequence[Sample]) -> Iterator[tuple[list[int], PackedBatch, torch.Tensor]]:
        """Yield (places, batch, hidden_te) for this rank's part of the samples, in batches of similar lengths.

        `places` are the indices of the batch's samples in `samples`.
        """
        for places, batch in self._packed(samples):
            yield places, batch, self.model.encode(batch.inputs)

    def _packed(self, samples: Sequence[Sample]) -> Iterator[tuple[list[int], PackedBatch]]:
        lengths = [_length(sample) for sample in samples]
        order = sorted(range(len(samples)), key=lambda i: lengths[i])
        if self.group:
            order = order[self.group.ranks.rank :: self.group.ranks.world_size]
        start = 0
        while start < len(order):
            stop, positions = start, 0
            while stop < len(order) and (stop == start or positions + lengths[order[stop]] <= _POSITIONS_PER_BATCH):
                positions += lengths[order[stop]]
                stop += 1
            places = order[start:stop]
            yield places, self.packer.pack([samples[i] for i in places]).to(self.device)
            start = stop

    @property
    def is_main(self) -> bool:
        """Whether this rank logs and writes files."""
        return self.group is None or self.group.ranks.is_main

    def require(self, ability: str, what: str | None = None) -> None:
        """Raise UserError if the model lacks an ability (see `opt_ds.abilities`) that it requires to do `what`."""
        what, loss = what or ability, self.config.tasks.loss_for(ability)
        if not self.config.can(ability):
            raise UserError(f"this model was trained without {loss} (tasks.{loss}.weight is 0): it cannot {what}")

    def require_guidance(self) -> None:
        """Raise UserError if the model never learned images without an input, which classifier-free guidance requires."""
        self.require(GENERATE_IMAGES, "generate images")
        if not self.config.tasks.modality.condition_dropout:
            raise UserError(
                "this model was trained without dropped conditions (tasks.modality.condition_dropout is 0): use guidance 1"
            )

    def _from_all(self, values: Any, own: list[int]) -> Any:
        """Fill an array or list that holds this rank's entries with the entries of the other ranks, and return it."""
        if self.group:
            for part in self.group.gather({place: values[place] for place in own}):
                for place, value in part.items():
                    values[place] = value
        return values

    def cls_vectors(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the encoder's [CLS] of each sample, float32 [samples, e]."""
        return self._from_cls(samples, self.config.model.hidden_size, lambda cls_se: cls_se)

    @torch.inference_mode()
    def _from_cls(
        self, samples: Sequence[Sample], width: int, head: Callable[[torch.Tensor], torch.Tensor]
    ) -> np.ndarray:
        """Return a head's output for each sample's [CLS], float32 [samples, width]."""
        found, own = np.empty((len(samples), width), dtype=np.float32), list[int]()
        for places, batch in self._packed(samples):
            own += places
            found[places] = head(self.model.encode_cls(batch.inputs)).float().cpu().numpy()
        return self._from_all(found, own)

    def write_text(self, samples: Sequence[Sample], options: DecodingConfig) -> list[str]:
        """Return the text that the text decoder generates for each sample."""
        texts, own = [""] * len(samples), list[int]()
        for places, batch, hidden_te in self.batches(samples):
            own += places
            begin, end = self.packer.cls_id, self.packer.sep_id
            written = write(
                self.model.text_decoder, hidden_te, batch.inputs.sequences, begin, end, options, keys=np.array(places)
            )
            for place, ids in zip(places, written, strict=True):
                texts[place] = self.decode_text(ids)
        return self._from_all(texts, own)

    def write_codes(self, samples: Sequence[Sample], options: DecodingConfig) -> np.ndarray:
        """Return the image codes that the image decoder generates for each sample, int64 [samples, codes per image]."""
        codes = np.empty((len(samples), self.config.model.num_image_codes), dtype=np.int64)
        decoder = self.model.image_decoder if options.guidance == 1 else self._guided(options.guidance)
        begin, own = self.model.image_decoder.begin_id, list[int]()
        for places, batch, hidden_te in self.batches(samples):
            written = write(decoder, hidden_te, batch.inputs.sequences, begin, None, options, keys=np.array(places))
            own += places
            codes[places] = np.array(written)
        return self._from_all(codes, own)

    @torch.inference_mode()
    def _guided(self, scale: float) -> GuidedDecoder:
        """Return the image decoder with guidance. The condition that it was trained to lack is an empty sample."""
        self.require_guidance()
        nothing = self.packer.pack([Sample()]).to(self.device)
        return GuidedDecoder(self.model.image_decoder, self.model.encode(nothing.inputs), scale)

    @torch.inference_mode()
    def code_bits(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return −log2 P(code | previous codes, sample) of each sample's code targets, float64 [samples, codes per image].

        See `set_code_targets`.
        """
        bits, own = np.empty((len(samples), self.config.model.num_image_codes)), list[int]()
        for places, batch, hidden_te in self.batches(samples):
            targets = code_targets(batch)
            scores = self.model.image_decoder.scores(targets, hidden_te).float()
            item = torch.nn.functional.cross_entropy(scores, targets.target_ids, reduction="none")
            own += places
            bits[places] = item.double().view(len(places), -1).cpu().numpy() / np.log(2)
        return self._from_all(bits, own)

    def matching_scores(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the matching head's scores of each sample, float32 [samples, 5]."""
        scores = self._from_cls(samples, NUM_LABELS, self._head(MATCH).score)
        return torch.from_numpy(scores).log_softmax(-1).numpy() if self.matches_by_softmax else scores

    def alignment_embeddings(self, samples: Sequence[Sample], view: str) -> np.ndarray:
        """Return the normalised embedding of each sample as a view (see `opt_ds.tasks.alignment`), float32 [samples, d]."""
        head = self._head(ALIGN)
        return self._from_cls(samples, self.config.tasks.alignment.width, lambda cls_se: head.embed(cls_se, view))

    @property
    def matches_by_softmax(self) -> bool:
        """Whether the matching labels are mutually exclusive in the model's head."""
        return self._head(MATCH).loss == "ce"

    def _head(self, ability: str) -> Any:
        loss = self.config.tasks.loss_for(ability)
        return next(self.model.head(name) for name, unit in self.config.tasks.units.items() if loss in unit.loss_names())

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the label head's labels; empty without such a head."""
        head = self._head(LABEL)
        return head.names if head is not None else ()

    @property
    def labels_are_answers(self) -> bool:
        """Whether the label head was trained on answers to questions."""
        head = self._head(LABEL)
        return head is not None and head.answers

    def label_scores(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the label head's logits for `label_names`, float32 [samples, names].

        Raise UserError if the model has no such head.
        """
        head = self._head(LABEL)
        if head is None:
            raise UserError("this model has no label head: opt-ds finetune classification, or vqa, trains one")
        return self._from_cls(samples, len(head.names), head.scores)

    def text_log_likelihood(self, samples: Sequence[Sample], texts: Sequence[np.ndarray]) -> np.ndarray:
        """Return log P(text | sample) for every pair, including [SEP], float64 [samples, texts].

        Texts are WordPiece ids.

        Each sample is encoded once. Its keys and values are used for all texts.
        """
        found = self.text_log_likelihood_of(samples, texts, [np.arange(len(texts))] * len(samples))
        return np.stack(found) if found else np.empty((0, len(texts)))

    @torch.inference_mode()
    def text_log_likelihood_of(
        self, samples: Sequence[Sample], texts: Sequence[np.ndarray], wanted: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Return log P(text | sample) for selected pairs.

        Sample i is paired with the texts whose indices are wanted[i]. The result has one float64 array of
        len(wanted[i]) per sample.
        """
        found, own = [np.empty(len(places)) for places in wanted], list[int]()
        chosen = [i for i, places in enumerate(wanted) if len(places)]
        for inner, batch, hidden_te in self.batches([samples[i] for i in chosen]):
            pairs = [(k, i, n) for k, i in enumerate(chosen[k] for k in inner) for n in range(len(wanted[i]))]
            own += [chosen[k] for k in inner]
            starts = batch.inputs.sequences.cu_seqlens.tolist()
            for part in _parts([len(texts[wanted[i][n]]) + 1 for _, i, n in pairs], self.config.model.vocab_size):
                ks, scored = [k for k, _, _ in pairs[part]], [texts[wanted[i][n]] for _, i, n in pairs[part]]
                values = self._score_texts(scored, ks, hidden_te, starts)
                for (_, i, n), value in zip(pairs[part], values, strict=True):
                    found[i][n] = value
        return self._from_all(found, own)

    def _score_texts(
        self, texts: Sequence[np.ndarray], ks: Sequence[int], hidden_te: torch.Tensor, starts: list[int]
    ) -> list[float]:
        """Return log P of each text given its sample, in the order of the samples.

        The texts of one sample share its memory.

        Args:
            texts: WordPiece ids.
            ks: Per text, the index of its sample in the batch, in ascending order.
            hidden_te: The encoder's packed output.
            starts: Row of `hidden_te` at which each sample starts.

        Returns:
            One log likelihood per text.
        """
        # A text of the maximum length may be truncated, so no model has learned to end it.
        ends = [[self.packer.sep_id] if len(text) < self.config.model.max_text_tokens else [] for text in texts]
        ids, targets, sequences = _teacher_forced(texts, self.packer.cls_id, ends, self.device)
        rows = np.array([len(text) + len(end) for text, end in zip(texts, ends, strict=True)])
        read = sorted(set(ks))
        memory = [range(starts[k], starts[k + 1]) for k in read]
        decoder_batch = DecoderBatch(
            ids,
            targets,
            torch.cat([torch.arange(n) for n in rows.tolist()]).to(self.device),
            sequences,
            memory_index=torch.tensor([row for some in memory for row in some], device=self.device),
            memory=Sequences.from_lengths([len(some) for some in memory], device=self.device),
            query_groups=Sequences.from_lengths([int(rows[np.array(ks) == k].sum()) for k in read], device=self.device),
        )
        scores = self.model.text_decoder.scores(decoder_batch, hidden_te).float()
        item = -torch.nn.functional.cross_entropy(scores, targets, reduction="none")
        return (sequences.pad(item) * sequences.valid).double().sum(1).tolist()

    def decode_text(self, ids: Sequence[int]) -> str:
        """Return WordPiece ids as text."""
        # The clean-up turns "man ' s shoe" back into "man's shoe".
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=True)
        assert isinstance(text, str), "one list of ids gives one text"
        return text


def _length(sample: Sample) -> int:
    return 3 + sum(len(items) for items in sample.items.values())


def _parts(rows: Sequence[int], outputs: int) -> Iterator[slice]:
    """Yield consecutive slices of the texts whose scores [rows, outputs] fit into a bounded amount of memory."""
    start, total = 0, 0
    for place, count in enumerate(rows):
        if place > start and (total + count) * outputs > _SCORES_AT_ONCE:
            yield slice(start, place)
            start, total = place, 0
        total += count
    if rows:
        yield slice(start, len(rows))


def _teacher_forced(
    texts: Sequence[np.ndarray], begin: int, ends: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Sequences]:
    targets = [np.append(text, end).astype(np.int64) for text, end in zip(texts, ends, strict=True)]
    ids = torch.from_numpy(np.concatenate([np.append(begin, target[:-1]) for target in targets]).astype(np.int64))
    sequences = Sequences.from_lengths([len(target) for target in targets], device=device)
    return ids.to(device), torch.from_numpy(np.concatenate(targets)).to(device), sequences
