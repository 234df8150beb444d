"""Transformer layers over packed sequences, shared by the encoder and both decoders. They call `opt_ds.ops` only.

Shape letters: t packed query rows, r output positions among them, u packed memory rows, e width, h heads, d head width,
b sequences decoded together.

Norm placement: one LayerNorm follows every sublayer. With `post` (BERT) the residual stream is the norm's output. With
`pre` the stream stays un-normalised and the next sublayer reads the norm's output. The first sublayer uses the
embedding's LayerNorm.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from opt_ds.config import ModelConfig
from opt_ds.nn.inputs import OutputPositions
from opt_ds.ops.attention import attention, cached_attention
from opt_ds.ops.dropout import dropout
from opt_ds.ops.layer_norm import add_layer_norm, layer_norm
from opt_ds.ops.sequences import Sequences

#: Smallest term added to the variance of a summand. A row of zeros has the variance 0, and BERT's 1e-12 would multiply its
#: gradient by a million.
_LEAST_EPS = 1e-6


class LayerNorm(nn.Module):
    """LayerNorm from `opt_ds.ops`, optionally fused with the dropout and residual addition before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.eps, self.probability, self.pre = config.layer_norm_eps, config.dropout, config.norm == "pre"
        self.dropout_layer_id = 0

    def forward(
        self, x: torch.Tensor, stream: torch.Tensor | None = None, rows: Sequences | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return LN(x). With `stream`, return (LN(stream + dropout(x)), the new stream).

        `rows` describes the sequences of the packed rows; a compiled backend keys its dropout by them.
        """
        if stream is None:
            return layer_norm(x, self.weight, self.bias, self.eps)
        probability = self.probability if self.training else 0.0
        normed, total = add_layer_norm(
            x, stream, self.weight, self.bias, self.eps, probability, rows, self.dropout_layer_id
        )
        return normed, (total if self.pre else normed)


class SummandNorm(nn.Module):
    """LayerNorm of one summand of an input embedding (as UNITER's), if `normalize_embedding_summands` is set.

    It starts with the deviation of the embedding tables, so that all summands start with the same one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        deviation = config.embedding_range or config.initializer_range
        self.weight = nn.Parameter(torch.full((config.hidden_size,), deviation))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.eps = max(config.layer_norm_eps, _LEAST_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised rows [..., e]."""
        return layer_norm(x, self.weight, self.bias, self.eps)


def summand_norm(config: ModelConfig) -> nn.Module:
    """Return the norm of one summand of an input embedding, or the identity if the model has none."""
    return SummandNorm(config) if config.normalize_embedding_summands else nn.Identity()


class Dropout(nn.Module):
    """Dropout of packed rows."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability, self.dropout_layer_id = probability, 0

    def forward(self, x_te: torch.Tensor, rows: Sequences | None) -> torch.Tensor:
        """Apply dropout to [t, e] in training mode; `rows` describes the sequences of the packed rows."""
        return dropout(x_te, self.probability if self.training else 0.0, rows, self.dropout_layer_id)


def number_dropout_layers(model: nn.Module) -> None:
    """Assign a unique dropout layer id to every dropout of the model. The id is part of the key of its random bits."""
    layers = (m for m in model.modules() if isinstance(m, (LayerNorm, Dropout, SelfAttention, CrossAttention)))
    for number, module in enumerate(layers):
        module.dropout_layer_id = number


class FusedProjection(nn.Linear):
    """Fused linear projection to queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def forward(self, x_te: torch.Tensor, rows_r: torch.Tensor | None = None) -> Any:
        """Return [t, 3e].

        With `rows_r`, return a pair: queries [r, e] of these rows, and keys and values [t, 2e] of all rows.
        """
        if rows_r is None:
            return super().forward(x_te)
        sizes = [self.in_features, 2 * self.in_features]
        (query, key_value), (query_bias, key_value_bias) = self.weight.split(sizes), self.bias.split(sizes)
        return F.linear(x_te.index_select(0, rows_r), query, query_bias), F.linear(x_te, key_value, key_value_bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal, self.probability = config.num_heads, causal, config.attention_dropout
        self.dropout_layer_id = 0
        self.qkv = FusedProjection(config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def project(self, x_te: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values, each [t, h, d]."""
        return self.qkv(x_te).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)

    def forward(self, x_te: torch.Tensor, sequences: Sequences, read: OutputPositions | None = None) -> torch.Tensor:
        """Return [t, e]. With `read`, return [r, e]: the output positions only, which attend to all rows."""
        queries = sequences if read is None else read.sequences
        if read is None:
            q_thd, k_thd, v_thd = self.project(x_te)
        else:
            q_re, kv_te = self.qkv(x_te, read.index)
            q_thd = q_re.unflatten(-1, (self.num_heads, -1))
            k_thd, v_thd = kv_te.unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        probability = self.probability if self.training else 0.0
        attended = attention(q_thd, k_thd, v_thd, queries, sequences, self.causal, probability, self.dropout_layer_id)
        return self.output(attended.flatten(-2))

    def decode(self, x_be: torch.Tensor, cache: "LayerCache") -> torch.Tensor:
        """Attend from one new position per sequence. Its key and value are appended to the cache."""
        q_bhd, k_bhd, v_bhd = self.project(x_be)
        keys, values = cache.append(k_bhd, v_bhd)
        return self.output(cached_attention(q_bhd[:, :, None], keys, values).flatten(1))


class CrossAttention(nn.Module):
    """Multi-head attention of a decoder over the encoder's output of the same sample."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.probability, self.dropout_layer_id = config.num_heads, config.attention_dropout, 0
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_value = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def memory(self, memory_ue: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values, each [u, h, d], of the encoder's output."""
        return self.key_value(memory_ue).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)

    def forward(self, x_te: torch.Tensor, sequences: Sequences, memory_ue: torch.Tensor, memory: Sequences) -> torch.Tensor:
        """Attend from the decoder's rows to the memory rows of the same sample.

        Args:
            x_te: Decoder rows [t, e].
            sequences: Query groups: the decoder rows grouped by the memory sequence that they attend to.
            memory_ue: The encoder's output [u, e].
            memory: The memory sequences.

        Returns:
            [t, e].
        """
        q_thd = self.query(x_te).unflatten(-1, (self.num_heads, -1))
        k_uhd, v_uhd = self.memory(memory_ue)
        probability = self.probability if self.training else 0.0
        attended = attention(q_thd, k_uhd, v_uhd, sequences, memory, False, probability, self.dropout_layer_id)
        return self.output(attended.flatten(-2))

    def decode(self, x_be: torch.Tensor, cache: "LayerCache") -> torch.Tensor:
        """Attend from one new position per sequence to the cached memory; return [b, e]."""
        q_bhd = self.query(x_be).unflatten(-1, (self.num_heads, -1))
        attended = cached_attention(q_bhd[:, :, None], cache.memory_keys, cache.memory_values, cache.memory_valid)
        return self.output(attended.flatten(1))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.ffn_size)
        self.down = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., e] for input [..., e]."""
        return self.down(F.gelu(self.up(x)))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by its residual addition and norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention, self.attention_norm = SelfAttention(config, causal=False), LayerNorm(config)
        self.ffn, self.ffn_norm = FeedForward(config), LayerNorm(config)

    def forward(
        self, x_te: torch.Tensor, stream_te: torch.Tensor, sequences: Sequences, read: OutputPositions | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer over all rows, or compute its output at the output positions only.

        Args:
            x_te: Normed rows [t, e].
            stream_te: Residual stream [t, e].
            sequences: The sequences of the rows.
            read: The output positions. None: all rows.

        Returns:
            (normed rows, stream), each [t, e], or [r, e] with `read`. The output positions attend to all rows.
        """
        attended = self.attention(x_te, sequences, read)
        if read is not None:
            stream_te, sequences = stream_te.index_select(0, read.index), read.sequences
        x_te, stream_te = self.attention_norm(attended, stream_te, sequences)
        return self.ffn_norm(self.ffn(x_te), stream_te, sequences)


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention and feed-forward, each followed by its residual addition and norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention, self.attention_norm = SelfAttention(config, causal=True), LayerNorm(config)
        self.cross, self.cross_norm = CrossAttention(config), LayerNorm(config)
        self.ffn, self.ffn_norm = FeedForward(config), LayerNorm(config)

    def forward(
        self,
        x_te: torch.Tensor,
        stream_te: torch.Tensor,
        sequences: Sequences,
        query_groups: Sequences,
        memory_ue: torch.Tensor,
        memory: Sequences,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer teacher-forced.

        Args:
            x_te: Normed rows [t, e].
            stream_te: Residual stream [t, e].
            sequences: The decoder sequences, for self-attention.
            query_groups: Query groups: the decoder rows grouped by the memory sequence that they attend to.
            memory_ue: The encoder's output [u, e].
            memory: The memory sequences.

        Returns:
            (normed rows, stream), each [t, e].
        """
        x_te, stream_te = self.attention_norm(self.attention(x_te, sequences), stream_te, sequences)
        x_te, stream_te = self.cross_norm(self.cross(x_te, query_groups, memory_ue, memory), stream_te, sequences)
        return self.ffn_norm(self.ffn(x_te), stream_te, sequences)

    def decode(self, x_be: torch.Tensor, stream_be: torch.Tensor, cache: "LayerCache") -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer for one new position per sequence; return (normed rows, stream), each [b, e]."""
        x_be, stream_be = self.attention_norm(self.attention.decode(x_be, cache), stream_be)
        x_be, stream_be = self.cross_norm(self.cross.decode(x_be, cache), stream_be)
        return self.ffn_norm(self.ffn(x_be), stream_be)


class LayerStack(nn.Module):
    """A stack of layers.

    With `recompute`, activations inside the layers are not stored for the backward pass but recomputed there (Chen et
    al. 2016, "Training deep nets with sublinear memory cost").
    """

    recompute = False

    def run_layer(self, layer: nn.Module, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one layer; return (normed rows, stream)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False)  # restores the RNG state, so dropout is the same
        return layer(*arguments)


class Encoder(LayerStack):
    """The cross-modal encoder: a stack of layers over the packed sequences."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))

    def forward(
        self, hidden_te: torch.Tensor, sequences: Sequences, read: OutputPositions | None = None
    ) -> torch.Tensor:
        """Return [t, e]. With `read`, the last layer is computed at the output positions only; all other rows are 0."""
        stream_te = hidden_te
        *lower, last = self.layers
        for layer in lower:
            hidden_te, stream_te = self.run_layer(layer, hidden_te, stream_te, sequences)
        if read is None:
            return self.run_layer(last, hidden_te, stream_te, sequences)[0]
        hidden_re, _ = self.run_layer(last, hidden_te, stream_te, sequences, read)
        return torch.zeros_like(hidden_te).index_copy(0, read.index, hidden_re)


@dataclass
class LayerCache:
    """Cached keys and values of one decoder layer during decoding: [b, h, l, d], and [b, h, m, d] for the memory."""

    memory_keys: torch.Tensor
    memory_values: torch.Tensor
    memory_valid: torch.Tensor | None  # bool [b, m]; None: the memory has no padding
    keys: torch.Tensor  # allocated for the maximum length
    values: torch.Tensor
    length: int = 0  # positions written so far

    @staticmethod
    def empty(keys_ume: torch.Tensor, values_ume: torch.Tensor, memory: Sequences, max_positions: int) -> "LayerCache":
        """Build a cache without decoded positions.

        Args:
            keys_ume: Keys of the memory [u, h, d].
            values_ume: Values of the memory [u, h, d].
            memory: The b memory sequences.
            max_positions: Maximum number of positions per sequence.
        """
        keys, values = memory.pad(keys_ume).transpose(1, 2), memory.pad(values_ume).transpose(1, 2)
        shape = (len(memory), keys.shape[1], max_positions, keys.shape[3])
        valid = None if memory.min_length == memory.max_length else memory.valid
        return LayerCache(keys, values, valid, keys.new_empty(shape), keys.new_empty(shape))

    def append(self, k_bhd: torch.Tensor, v_bhd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one position; return all keys and values so far."""
        self.keys[:, :, self.length] = k_bhd
        self.values[:, :, self.length] = v_bhd
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def select(self, index: torch.Tensor) -> "LayerCache":
        """Return a cache of the sequences at `index`, such as the unfinished ones; an index may repeat."""
        keys, values = (x.new_empty(len(index), *x.shape[1:]) for x in (self.keys, self.values))
        for chosen, x in ((keys, self.keys), (values, self.values)):
            chosen[:, :, : self.length] = x[:, :, : self.length].index_select(0, index)
        valid = None if self.memory_valid is None else self.memory_valid.index_select(0, index)
        memory_keys, memory_values = (x.index_select(0, index) for x in (self.memory_keys, self.memory_values))
        return LayerCache(memory_keys, memory_values, valid, keys, values, self.length)

    def reorder(self, index: torch.Tensor) -> None:
        """Let sequence i continue from sequence index[i], over the same memory. Used for the surviving beams."""
        for x in (self.keys, self.values):
            x[:, :, : self.length] = x[:, :, : self.length].index_select(0, index)


class Decoder(LayerStack):
    """A stack of decoder layers: teacher-forced over packed sequences, or one position at a time with a cache."""

    def __init__(self, config: ModelConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(num_layers))

    def forward(
        self,
        hidden_te: torch.Tensor,
        sequences: Sequences,
        memory_ue: torch.Tensor,
        memory: Sequences,
        query_groups: Sequences | None = None,
    ) -> torch.Tensor:
        """Run all layers teacher-forced.

        Args:
            hidden_te: Embedded decoder rows [t, e].
            sequences: The decoder sequences.
            memory_ue: The encoder's output [u, e].
            memory: The memory sequences.
            query_groups: Query groups: rows grouped by the memory sequence that they attend to, where several sequences
                share one.
                None: each decoder sequence has its own memory sequence.

        Returns:
            Hidden states [t, e].
        """
        stream_te = hidden_te
        query_groups = sequences if query_groups is None else query_groups
        for layer in self.layers:
            hidden_te, stream_te = self.run_layer(
                layer, hidden_te, stream_te, sequences, query_groups, memory_ue, memory
            )
        return hidden_te

    def start(self, memory_ue: torch.Tensor, memory: Sequences, max_positions: int) -> list[LayerCache]:
        """Return empty caches, one per layer, over the encoder's output of b sequences.

        `max_positions` is the maximum number of positions.
        """
        return [
            LayerCache.empty(*layer.cross.memory(memory_ue), memory, max_positions) for layer in self._decoder_layers()
        ]

    def decode(self, hidden_be: torch.Tensor, caches: list[LayerCache]) -> torch.Tensor:
        """Return the hidden state [b, e] of one new position per sequence."""
        stream_be = hidden_be
        for layer, cache in zip(self._decoder_layers(), caches, strict=True):
            hidden_be, stream_be = layer.decode(hidden_be, stream_be, cache)
        return hidden_be

    def _decoder_layers(self) -> Iterator[DecoderLayer]:
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer), "a ModuleList does not know the type of its items"
            yield layer
