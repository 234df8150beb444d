"""Token-level corruption: how many items of a modality are masked, which ones, and what stands in their place."""

import numpy as np

from opt_ds.ops.keyed import keyed_choice, keyed_hash, keyed_uniform

MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.8, 0.1  # the rest stays as it is (Devlin et al. 2019, §3.1)


def num_masked(lengths: np.ndarray | int, probability: float) -> np.ndarray:
    """Exactly max(1, round(probability · n)) of n items, 0 of 0 items; int64, elementwise. Halves round to even."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.where(lengths > 0, np.maximum(1, np.rint(probability * lengths)), 0).astype(np.int64)


def num_masked_frames(lengths: np.ndarray | int, probability: float) -> np.ndarray:
    """As `num_masked`, but at least one frame of an utterance stays: it is the evidence, and MAC's negative."""
    return np.minimum(num_masked(lengths, probability), np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0))


def masked_items(length: int, count: int, *keys: int | str) -> np.ndarray:
    """bool [length] with exactly `count` ones, every subset equally likely."""
    masked = np.zeros(length, dtype=bool)
    masked[np.argsort(keyed_hash(*keys, np.arange(length)), kind="stable")[:count]] = True
    return masked


def masked_spans(length: int, count: int, span: int, *keys: int | str) -> np.ndarray:
    """bool [length] with exactly `count` ones in runs of `span` (runs may touch; one may be shorter, the remainder)."""
    masked = np.zeros(length, dtype=bool)
    num_starts = max(1, length - span + 1)  # the end cuts no run off: a lone frame is copied from its neighbour
    for start in np.argsort(keyed_hash(*keys, np.arange(num_starts)), kind="stable"):
        free = np.flatnonzero(~masked[start : start + span])[: count - int(masked.sum())]
        masked[start + free] = True
        if masked.sum() == count:
            break
    return masked


def corrupt_tokens(
    tokens: np.ndarray, masked: np.ndarray, mask_id: int, ordinary_ids: np.ndarray, *keys: int | str
) -> np.ndarray:
    """Tokens with the masked ones replaced 80/10/10 by [MASK], by a random ordinary token, or not at all; int64 [n]."""
    index = np.arange(len(tokens))
    share = keyed_uniform(*keys, "share", index)
    random_tokens = ordinary_ids[keyed_choice(len(ordinary_ids), *keys, "token", index)]
    replacement = np.where(share < MASK_TOKEN_SHARE, mask_id, tokens)
    randomised = (share >= MASK_TOKEN_SHARE) & (share < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE)
    replacement = np.where(randomised, random_tokens, replacement)
    return np.where(masked, replacement, tokens).astype(np.int64)
