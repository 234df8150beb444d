"""Proportions in which several weighted stores are read: quotas per block of samples, at least one for each store."""

import numpy as np

from opt_ds.errors import UserError

MIX_BLOCK = 4096  # number of positions in which several weighted stores have exactly their proportions


def mix_quotas(weights: tuple[float, ...]) -> np.ndarray:
    """Return the number of samples of each store per block of `MIX_BLOCK` samples, int64: its proportion, rounded.

    Raise UserError, with the smallest possible weight, if a weight is so small that its store would never be read.
    """
    shares = np.array(weights) / sum(weights)
    quota = np.floor(shares * MIX_BLOCK).astype(np.int64)
    quota[np.argsort(quota - shares * MIX_BLOCK)[: MIX_BLOCK - quota.sum()]] += 1
    if not quota.all():
        number = int(np.argmin(quota))
        others = sum(weights) - weights[number]
        smallest = np.format_float_positional(others / (MIX_BLOCK - 1), precision=3, fractional=False, trim="-")
        raise UserError(
            f"data.mix: weight {weights[number]:g} (store number {number + 1} of {len(weights)}) is less than one sample in "
            f"{MIX_BLOCK:,}, so its store would never be read: raise it to {float(smallest) * 1.001:.4g} or more, or remove "
            "the store"
        )
    return quota


def mix_note(weights: tuple[float, ...]) -> str | None:
    """Return a line about rounded proportions, or None if each is within 1 % of its exact value."""
    shares, taken = np.array(weights) / sum(weights), mix_quotas(weights) / MIX_BLOCK
    if (np.abs(taken - shares) <= 0.01 * shares).all():
        return None
    listed = ", ".join(f"{100 * own:.3g} % instead of {100 * share:.3g} %" for own, share in zip(taken, shares, strict=True))
    return f"data.mix is rounded to steps of 1/{MIX_BLOCK:,}: {listed}"
