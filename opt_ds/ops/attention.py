"""Variable-length multi-head attention over packed sequences: self or cross, causal or not.

Shape letters: t packed query rows, u packed key rows, h heads, d head width, S sequences, L length of the longest
sequence.
"""

import torch
import torch.nn.functional as F

from opt_ds.ops import backend
from opt_ds.ops.dropout import generator_dropout, kind_of_device
from opt_ds.ops.padded_groups import PaddedGroup, PaddedGroups
from opt_ds.ops.sequences import Sequences


def attention(
    q_thd: torch.Tensor,
    k_uhd: torch.Tensor,
    v_uhd: torch.Tensor,
    queries: Sequences,
    keys: Sequences,
    causal: bool = False,
    dropout: float = 0.0,
    layer_id: int = 0,
) -> torch.Tensor:
    """Compute softmax(q kᵀ / √d) v within each pair of query and key sequences (Vaswani et al. 2017, eq. 1).

    The softmax is computed in fp32 whatever the dtype of the inputs. The torch backend rounds the scores and the
    probabilities to the dtype of the inputs. A query sequence whose key sequence is empty gets 0.

    Args:
        q_thd: Queries [t, h, d].
        k_uhd: Keys [u, h, d].
        v_uhd: Values [u, h, d].
        queries: The query sequences; t rows in total.
        keys: The key sequences, one per query sequence; u rows in total.
        causal: Let a query attend to keys up to its own position only. For self-attention.
        dropout: Dropout probability, applied to the attention probabilities.
        layer_id: Dropout layer id. A compiled backend keys its random bits by it.

    Returns:
        [t, h, d], in the dtype of the inputs.
    """
    assert len(queries) == len(keys), "each query sequence has its key sequence"
    assert not causal or queries.max_length == keys.max_length, "causal attention is self-attention"
    library = backend.library("attention")
    if library is None:
        return _torch_attention(q_thd, k_uhd, v_uhd, queries, keys, causal, dropout)
    sample_index, key = (queries.sample_index_or_range, backend.dropout_key()) if dropout > 0.0 else (None, 0)
    return getattr(torch.ops, library).attention(
        q_thd, k_uhd, v_uhd, queries.cu_seqlens, keys.cu_seqlens, queries.max_length, keys.max_length, q_thd.shape[-1] ** -0.5,
        causal, sample_index, dropout, key, layer_id,
    )[0]  # fmt: skip


def _torch_attention(
    q_thd: torch.Tensor,
    k_uhd: torch.Tensor,
    v_uhd: torch.Tensor,
    queries: Sequences,
    keys: Sequences,
    causal: bool,
    dropout: float,
) -> torch.Tensor:
    """Compute attention in plain PyTorch.

    Sequences of similar length are padded together and the scores are materialised. This is the reference. On the CPU
    it is also the fastest.
    """
    if not queries.total or not keys.total:
        return q_thd * 0.0 + (k_uhd.sum() + v_uhd.sum()) * 0.0
    makes_code_for_shapes = kind_of_device(q_thd) == "cpu" and q_thd.dtype in (torch.float16, torch.bfloat16)  # oneDNN
    layout = PaddedGroups.of(queries, keys, few_shapes=makes_code_for_shapes)
    parts = [x.index_select(0, index).split(sizes) for x, (index, sizes) in (
        (q_thd, (layout.query_rows, layout.query_sizes)),
        (k_uhd, (layout.key_rows, layout.key_sizes)),
        (v_uhd, (layout.key_rows, layout.key_sizes)),
    )]  # fmt: skip
    attended = [
        _padded_attention(q, k, v, group, causal, dropout) for q, k, v, group in zip(*parts, layout.groups, strict=True)
    ]
    output = torch.cat(attended).index_select(0, layout.place_of_row)
    if keys.min_length == 0:
        has_keys = (keys.lengths > 0).repeat_interleave(queries.lengths, output_size=queries.total)
        output = output * has_keys[:, None, None]
    return output


def _padded_attention(
    q_phd: torch.Tensor, k_phd: torch.Tensor, v_phd: torch.Tensor, group: PaddedGroup, causal: bool, dropout: float
) -> torch.Tensor:
    """Compute the attention of one group's padded rows; return [padded query rows, h, d]."""
    num_heads, head_dim = q_phd.shape[1:]

    def heads_first(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (group.num_sequences, -1)).transpose(1, 2).flatten(0, 1)  # [S·h, L, d]

    q, k, v = heads_first(q_phd), heads_first(k_phd), heads_first(v_phd)
    scale = head_dim**-0.5
    if group.key_bias is None:
        scores = torch.bmm(q * scale, k.transpose(1, 2))
    else:
        bias = group.key_bias.to(q.dtype).repeat_interleave(num_heads, dim=0)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill_(above, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1)  # computed in fp32 internally, whatever the dtype
    if dropout > 0.0:
        probabilities = generator_dropout(probabilities, dropout)
    return torch.bmm(probabilities, v).unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(0, 1)


def cached_attention(
    q_bhld: torch.Tensor, k_bhld: torch.Tensor, v_bhld: torch.Tensor, key_valid_bl: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend from a few new queries to cached keys, for decoding.

    Args:
        q_bhld: Queries [b, h, l, d].
        k_bhld: Keys [b, h, L, d].
        v_bhld: Values [b, h, L, d].
        key_valid_bl: Mask of the keys that exist, bool [b, L]. None: all keys exist.

    Returns:
        [b, h, l, d].
    """
    mask = None if key_valid_bl is None else key_valid_bl[:, None, None, :]
    return F.scaled_dot_product_attention(q_bhld, k_bhld, v_bhld, attn_mask=mask)
