"""transformers' BERT on the rows of opt_ds's embedders: without padding, or padded.

Both use transformers' encoder layers and head, and score the vocabulary at masked WordPieces only. They share the
embedders, and the table of word embeddings with the head, as opt_ds does. BERT's own sum of embeddings is omitted,
because the embedders already add positions and types.

Without padding, all samples of a micro-batch are one sequence of length T. On a GPU with flash-attn, transformers
attends within the samples by itself (`flash_attention_2` with cumulative lengths). Elsewhere it cannot: its flash
kernels run on GPUs, `flex_attention` has no dropout, and `create_bidirectional_mask` ignores position ids. There,
`attend_by_sample` is registered as attention function, which is transformers' interface for such extensions.

Shape letters: t packed rows, m masked WordPieces, s samples, l length of the longest, e width, h heads, d head width.
"""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from opt_ds.config import ModelConfig
from opt_ds.data.batch import PackedBatch
from opt_ds.model.embeddings import InputEmbeddings
from opt_ds.model.opt import OPT
from opt_ds.ops.sequences import Sequences
from opt_ds.tasks.mlm import MaskedTokens, MlmHead

BY_SAMPLE = "sdpa_by_sample"
FLASH = "flash_attention_2"


def attend_by_sample(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    lengths: tuple[int, ...] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sample of a packed micro-batch by PyTorch's SDPA. The interface is transformers'.

    Args:
        module: The layer.
        query: [1, h, t, d].
        key: [1, h, t, d].
        value: [1, h, t, d].
        attention_mask: Must be None.
        dropout: Dropout probability of the attention weights.
        scaling: Factor on the scores.
        lengths: Lengths of the samples.

    Returns:
        ([1, t, h, d], None).
    """
    assert attention_mask is None, "packed rows need no mask"
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    attended = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling).transpose(1, 2) for q, k, v in parts
    ]
    return torch.cat(attended, dim=1), None


class MaskedBert(nn.Module):
    """transformers' BERT encoder and masked language modelling head, on opt_ds's embedders."""

    def __init__(self, model: ModelConfig, attention: str) -> None:
        from transformers import AttentionInterface, BertConfig, BertForMaskedLM

        super().__init__()
        AttentionInterface.register(BY_SAMPLE, attend_by_sample)
        bert = BertForMaskedLM._from_config(
            BertConfig(
                vocab_size=model.vocab_size, hidden_size=model.hidden_size, num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_heads, intermediate_size=model.ffn_size,
                hidden_dropout_prob=model.dropout, attention_probs_dropout_prob=model.attention_dropout,
                layer_norm_eps=model.layer_norm_eps,
            ),
            attn_implementation=attention,
        )  # fmt: skip
        self.attention = attention
        self.embeddings = InputEmbeddings(model)
        self.encoder, self.head = bert.bert.encoder, bert.cls.predictions
        self.head.decoder.weight, self.head.decoder.bias = self.embeddings.word.weight, self.head.bias

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Return the summed cross-entropy of the masked WordPieces, fp32."""
        masked = batch.parts["mlm"]
        assert isinstance(masked, MaskedTokens)
        rows_te, _ = self.embeddings(batch.inputs)
        hidden_me = self.encode(rows_te, batch.inputs.sequences, masked.index)
        return F.cross_entropy(self.head(hidden_me).float(), masked.targets, reduction="sum")

    @abstractmethod
    def encode(self, rows_te: torch.Tensor, sequences: Sequences, index_m: torch.Tensor) -> torch.Tensor:
        """Return the encoder's output [m, e] at the packed positions `index_m`."""


class UnpaddedBert(MaskedBert):
    """All samples of a micro-batch are one sequence. Each attends to itself."""

    def encode(self, rows_te: torch.Tensor, sequences: Sequences, index_m: torch.Tensor) -> torch.Tensor:
        """Return the encoder's output [m, e] at the packed positions `index_m`."""
        if self.attention == BY_SAMPLE:
            described: dict[str, Any] = {"lengths": tuple(sequences.host_lengths.tolist())}
        else:
            described = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), sequences.cu_seqlens)
            described |= dict.fromkeys(("max_length_q", "max_length_k"), sequences.max_length)
        hidden_te = self.encoder(rows_te[None], attention_mask=None, **described).last_hidden_state[0]
        return hidden_te.index_select(0, index_m)


class PaddedBert(MaskedBert):
    """The samples of a micro-batch are padded to the longest."""

    def encode(self, rows_te: torch.Tensor, sequences: Sequences, index_m: torch.Tensor) -> torch.Tensor:
        """Return the encoder's output [m, e] at the packed positions `index_m`."""
        same_length = sequences.min_length == sequences.max_length
        mask = None if same_length else sequences.valid[:, None, None, :]  # [s, 1, 1, l]
        hidden_sle = self.encoder(sequences.pad(rows_te), attention_mask=mask).last_hidden_state
        return hidden_sle.flatten(0, 1).index_select(0, sequences.place_of_row.index_select(0, index_m))


def unpadded_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Return the attention function of `UnpaddedBert`: flash-attn's where it is installed and runs."""
    from transformers.utils import is_flash_attn_2_available

    half = dtype in (torch.float16, torch.bfloat16)
    return FLASH if device.type == "cuda" and half and is_flash_attn_2_available() else BY_SAMPLE


@torch.no_grad()
def copy_weights(source: OPT, target: MaskedBert) -> None:
    """Set the weights of a baseline to those of an OPT of the same configuration."""
    head = source.head("mlm")
    assert isinstance(head, MlmHead)
    target.embeddings.load_state_dict(source.embeddings.state_dict())
    transform = target.head.transform
    pairs: list[tuple[Any, Any]] = [(head.transform, transform.dense), (head.norm, transform.LayerNorm)]
    layers: Any = zip(source.encoder.layers, target.encoder.layer, strict=True)
    for own, theirs in layers:
        projections = (theirs.attention.self.query, theirs.attention.self.key, theirs.attention.self.value)
        qkv = own.attention.qkv
        for part, weight, bias in zip(projections, qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        pairs += [
            (own.attention.output, theirs.attention.output.dense),
            (own.attention_norm, theirs.attention.output.LayerNorm),
            (own.ffn.up, theirs.intermediate.dense),
            (own.ffn.down, theirs.output.dense),
            (own.ffn_norm, theirs.output.LayerNorm),
        ]
    for module, copy in pairs:
        copy.weight.copy_(module.weight)
        copy.bias.copy_(module.bias)
    target.head.bias.copy_(head.bias)
