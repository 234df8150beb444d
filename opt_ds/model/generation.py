"""Generation with a decoder: greedy, beam search, and sampling with temperature, top-k and top-p.

Keys and values are cached.

Sampling is a pure function of (seed, key of the sequence, position), so it does not depend on the rest of the batch.

Legend: b sequences, v outputs.
"""

from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field

from opt_ds.config.section import Section
from opt_ds.nn.transformer import LayerCache
from opt_ds.ops.keyed import keyed_uniform
from opt_ds.ops.sequences import Sequences

#: Steps between two checks of which sequences have ended; a GPU has to synchronise at each check.
_LOOK_EVERY = {"cuda": 8}


class DecodingConfig(Section):
    """How a decoder generates text tokens or image codes. The options of `opt-ds generate` and `opt-ds evaluate` set it."""

    label: ClassVar[str] = "generation settings"

    method: Literal["greedy", "beam", "sample"] = Field("greedy", description="Greedy decoding, beam search, or sampling.")
    beam_size: int = Field(4, ge=1, description="beam: number of hypotheses that are kept.")
    length_penalty: float = Field(
        0.6, ge=0, description="beam: exponent of the length normalisation (Wu et al. 2016, eq. 14). 0: none."
    )
    temperature: float = Field(1.0, gt=0, description="sample: divisor of the logits.")
    top_k: int = Field(0, ge=0, description="sample: only the k most probable outcomes are kept. 0: all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample: only the most probable outcomes of this total probability are kept. 1: all."
    )
    max_length: int | None = Field(
        None, ge=1, description="Largest number of tokens or codes. None: the number of the decoder's positions."
    )
    seed: int = Field(1, ge=0, description="sample: seed of the random numbers.")
    guidance: float = Field(
        1.0,
        ge=0,
        description="Image codes: scale S of classifier-free guidance. The logits are those without a condition plus S times "
        "their difference from those with it. 1: none. Others require a model trained with "
        "`tasks.modality.condition_dropout`.",
    )


#: Default decoding of texts.
DEFAULT_DECODING = DecodingConfig(method="beam", beam_size=4)


def text_decoding(beam_size: int) -> DecodingConfig:
    """Return the options of beam search for texts, or of greedy search for a beam size of 1."""
    return DecodingConfig(method="beam" if beam_size > 1 else "greedy", beam_size=beam_size)


def image_decoding(
    top_k: int, top_p: float, temperature: float, seed: int, guidance: float = 1.0
) -> DecodingConfig:
    """Return the options of sampling image codes.

    Args:
        top_k: Sample from this many likeliest codes; 0: from all.
        top_p: Sample from the likeliest codes of this total probability; 0: only the likeliest one.
        temperature: Divides the logits.
        seed: Seed of the sampling.
        guidance: Scale of classifier-free guidance; 1: none.

    Returns:
        The options.
    """
    return DecodingConfig(
        method="sample", top_k=top_k, top_p=max(top_p, 1e-6), temperature=temperature, seed=seed, guidance=guidance
    )


class IncrementalDecoder(Protocol):
    """A decoder as generation uses it: `AutoregressiveDecoder`, or one with guidance (`opt_ds.model.guidance`)."""

    @property
    def num_positions(self) -> int:
        """Maximum number of items."""

    def start(self, memory_ue: torch.Tensor, memory: Sequences, length: int | None = None) -> list[LayerCache]:
        """Return empty caches for sequences over the encoder's output."""

    def decode(self, ids_b: torch.Tensor, position: int, caches: list[LayerCache]) -> torch.Tensor:
        """Return the scores [b, v] of the next items."""


@torch.inference_mode()
def write(
    decoder: IncrementalDecoder,
    memory_ue: torch.Tensor,
    memory: Sequences,
    begin_id: int,
    end_id: int | None,
    options: DecodingConfig,
    keys: np.ndarray | None = None,
) -> list[list[int]]:
    """Return one list of generated items per memory sequence, without start and end.

    Args:
        decoder: The decoder.
        memory_ue: The encoder's packed output.
        memory: Its sequences.
        begin_id: The first input.
        end_id: The item that ends a sequence. None: every sequence has the maximum length.
        options: Decoding options.
        keys: int64 [b], a key per sequence for sampling. None: 0 … b − 1.

    Returns:
        The items of each sequence.
    """
    if len(memory) == 0:
        return []
    length = min(options.max_length or decoder.num_positions, decoder.num_positions)
    if options.method == "beam":
        return _beam(decoder, memory_ue, memory, begin_id, end_id, length, options)
    keys = np.arange(len(memory)) if keys is None else keys
    device = memory_ue.device
    caches = decoder.start(memory_ue, memory, length)
    ids_b = torch.full((len(memory),), begin_id, dtype=torch.long, device=device)
    unfinished_b = torch.arange(len(memory), device=device)  # sequences that have not ended
    items_sl = torch.full((len(memory), length), -1 if end_id is None else end_id, dtype=torch.long, device=device)
    for position in range(length):
        scores_bv = decoder.decode(ids_b, position, caches).float()
        if options.method == "greedy":
            ids_b = scores_bv.argmax(-1)
        else:
            uniform_b = torch.from_numpy(keyed_uniform(options.seed, "write", keys, position)).to(device)
            ids_b = sample_scores(scores_bv, uniform_b, options)
        items_sl[unfinished_b, position] = ids_b
        if end_id is None or (position + 1) % _LOOK_EVERY.get(device.type, 1):
            continue
        kept_k = (items_sl[unfinished_b, : position + 1] != end_id).all(1).nonzero().squeeze(1)
        if not len(kept_k):
            break
        if 2 * len(kept_k) <= len(unfinished_b):  # with fewer the copy of the caches would not pay off
            caches = [cache.select(kept_k) for cache in caches]
            ids_b, unfinished_b, keys = ids_b[kept_k], unfinished_b[kept_k], keys[kept_k.cpu().numpy()]
    return [_until(row, end_id) for row in items_sl.tolist()]


def sample_scores(scores_bv: torch.Tensor, uniform_b: torch.Tensor, options: DecodingConfig) -> torch.Tensor:
    """Return int64 [b], sampled from softmax(scores / temperature) within the top k and the smallest set of mass top p.

    The distribution function is inverted at uniform_b in [0, 1).
    """
    sorted_bv, order_bv = torch.sort(scores_bv.double() / options.temperature, dim=-1, descending=True, stable=True)
    if options.top_k:
        sorted_bv[:, options.top_k :] = float("-inf")
    probability_bv = torch.softmax(sorted_bv, dim=-1)
    before_bv = probability_bv.cumsum(-1) - probability_bv
    probability_bv = probability_bv.masked_fill(before_bv >= options.top_p, 0.0)  # the first one is always kept
    cumulative_bv = probability_bv.cumsum(-1)
    target_b1 = (uniform_b[:, None] * cumulative_bv[:, -1:]).to(cumulative_bv.dtype)
    place_b1 = torch.searchsorted(cumulative_bv, target_b1, right=True)
    last_b1 = (probability_bv > 0).sum(-1, keepdim=True) - 1
    return order_bv.gather(1, torch.minimum(place_b1, last_b1)).squeeze(1)


def _beam(
    decoder: IncrementalDecoder,
    memory_ue: torch.Tensor,
    memory: Sequences,
    begin_id: int,
    end_id: int | None,
    length: int,
    options: DecodingConfig,
) -> list[list[int]]:
    """Return the result of beam search.

    Finished hypotheses are compared by log probability divided by their length penalty.
    """
    batch, beams, device = len(memory), options.beam_size, memory_ue.device
    first = torch.arange(batch, device=device).repeat_interleave(beams)
    caches = [cache.select(first) for cache in decoder.start(memory_ue, memory, length)]
    ids = torch.full((batch * beams,), begin_id, dtype=torch.long, device=device)
    total = torch.full((batch, beams), float("-inf"), device=device)
    total[:, 0] = 0.0  # all beams start equal, so only one of them is expanded
    written = torch.empty((batch * beams, 0), dtype=torch.long, device=device)
    best: list[tuple[float, list[int]]] = [(float("-inf"), []) for _ in range(batch)]
    for position in range(length):
        scores = torch.log_softmax(decoder.decode(ids, position, caches).float(), dim=-1)
        outputs = scores.shape[-1]
        candidates = (total.reshape(-1, 1) + scores).reshape(batch, -1)
        top, index = candidates.topk(min(2 * beams, candidates.shape[1]), dim=-1)
        parent = index // outputs + torch.arange(batch, device=device)[:, None] * beams
        item = index % outputs
        penalty = ((5.0 + position + 1) / 6.0) ** options.length_penalty
        ends = torch.zeros_like(item, dtype=torch.bool) if end_id is None else item == end_id
        for b, k in ends.nonzero().tolist():
            if float(top[b, k]) / penalty > best[b][0]:
                best[b] = (float(top[b, k]) / penalty, written[parent[b, k]].tolist())
        alive = top.masked_fill(ends, float("-inf"))
        total, keep = alive.topk(beams, dim=-1)
        parent, ids = parent.gather(1, keep).reshape(-1), item.gather(1, keep).reshape(-1)
        written = torch.cat([written.index_select(0, parent), ids[:, None]], dim=1)
        for cache in caches:
            cache.reorder(parent)
        best_possible = (total.max(-1).values / ((5.0 + length) / 6.0) ** options.length_penalty).tolist()
        if end_id is not None and all(score >= possible for (score, _), possible in zip(best, best_possible, strict=True)):
            break
    unfinished = written.reshape(batch, beams, -1)[:, 0].tolist()  # beams are sorted by score
    return [text if score > float("-inf") else unfinished[b] for b, (score, text) in enumerate(best)]


def _until(row: list[int], end_id: int | None) -> list[int]:
    return row[: row.index(end_id)] if end_id is not None and end_id in row else row
