"""Proportions in which several weighted stores are read: quotas per block of samples, at least one for each store."""

import numpy as np

from opt_ds.errors import UserError

SAMPLING_BLOCK = 4096  # number of positions in which several weighted stores have exactly their proportions


def store_quotas(weights: tuple[float, ...]) -> np.ndarray:
    """Return the number of samples of each store per block of `SAMPLING_BLOCK` samples, int64: its proportion, rounded.

    Raise UserError, with the smallest possible weight, if a weight is so small that its store would never be read.
    """
    fractions = np.array(weights) / sum(weights)
    quota = np.floor(fractions * SAMPLING_BLOCK).astype(np.int64)
    quota[np.argsort(quota - fractions * SAMPLING_BLOCK)[: SAMPLING_BLOCK - quota.sum()]] += 1
    if not quota.all():
        number = int(np.argmin(quota))
        others = sum(weights) - weights[number]
        smallest = np.format_float_positional(others / (SAMPLING_BLOCK - 1), precision=3, fractional=False, trim="-")
        raise UserError(
            f"data.store_weights: weight {weights[number]:g} (store number {number + 1} of {len(weights)}) is less than "
            f"one sample in {SAMPLING_BLOCK:,}, so its store would never be read: raise it to "
            f"{float(smallest) * 1.001:.4g} or more, or remove the store"
        )
    return quota


def store_weights_note(weights: tuple[float, ...]) -> str | None:
    """Return a line about rounded proportions, or None if each is within 1 % of its exact value."""
    fractions, taken = np.array(weights) / sum(weights), store_quotas(weights) / SAMPLING_BLOCK
    if (np.abs(taken - fractions) <= 0.01 * fractions).all():
        return None
    listed = ", ".join(
        f"{100 * own:.3g} % instead of {100 * fraction:.3g} %" for own, fraction in zip(taken, fractions, strict=True)
    )
    return f"data.store_weights is rounded to steps of 1/{SAMPLING_BLOCK:,}: {listed}"
