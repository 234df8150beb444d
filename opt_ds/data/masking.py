"""Token-level masking: how many items of a modality are masked, which ones, and their replacements."""

import numpy as np

from opt_ds.ops.keyed import keyed_choice, keyed_hash, keyed_uniform

MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.8, 0.1  # the rest is unchanged (Devlin et al. 2019, §3.1)


def num_masked(lengths: np.ndarray | int, probability: float) -> np.ndarray:
    """Return max(1, round(probability · n)) for n items and 0 for 0 items, int64, elementwise.

    Halves are rounded to even.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.where(lengths > 0, np.maximum(1, np.rint(probability * lengths)), 0).astype(np.int64)


def num_masked_frames(lengths: np.ndarray | int, probability: float) -> np.ndarray:
    """Return `num_masked`, but leave at least one frame of an utterance unmasked.

    That frame is the context, and a negative for MAC.
    """
    return np.minimum(num_masked(lengths, probability), np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0))


def masked_items(length: int, count: int, *keys: int | str) -> np.ndarray:
    """Return bool [length] with exactly `count` ones. All subsets are equally likely."""
    masked = np.zeros(length, dtype=bool)
    masked[np.argsort(keyed_hash(*keys, np.arange(length)), kind="stable")[:count]] = True
    return masked


def masked_spans(length: int, count: int, span: int, *keys: int | str) -> np.ndarray:
    """Return bool [length] with exactly `count` ones in runs of `span`. Runs may touch, and one run may be shorter."""
    masked = np.zeros(length, dtype=bool)
    # No run is truncated by the end: a single masked frame could be copied from its neighbour.
    num_starts = max(1, length - span + 1)
    for start in np.argsort(keyed_hash(*keys, np.arange(num_starts)), kind="stable"):
        free = np.flatnonzero(~masked[start : start + span])[: count - int(masked.sum())]
        masked[start + free] = True
        if masked.sum() == count:
            break
    return masked


def corrupt_tokens(
    tokens: np.ndarray, masked: np.ndarray, mask_id: int, ordinary_ids: np.ndarray, *keys: int | str
) -> np.ndarray:
    """Return the tokens with the masked ones replaced.

    A masked token becomes [MASK] (80 %) or a random token (10 %), or it is kept (10 %).

    Args:
        tokens: int64 [n].
        masked: bool [n].
        mask_id: Id of [MASK].
        ordinary_ids: Ids of the tokens that may replace a masked one.
        *keys: Keys of the random choices.

    Returns:
        int64 [n].
    """
    index = np.arange(len(tokens))
    share = keyed_uniform(*keys, "share", index)
    random_tokens = ordinary_ids[keyed_choice(len(ordinary_ids), *keys, "token", index)]
    replacement = np.where(share < MASK_TOKEN_SHARE, mask_id, tokens)
    randomised = (share >= MASK_TOKEN_SHARE) & (share < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE)
    replacement = np.where(randomised, random_tokens, replacement)
    return np.where(masked, replacement, tokens).astype(np.int64)
