"""The shares in which several weighted stores are read: places in a block of samples, at least one for each store."""

import numpy as np

from opt_ds.errors import UserError

MIX_BLOCK = 4096  # positions in which several weighted stores take exactly their shares


def mix_quotas(weights: tuple[float, ...]) -> np.ndarray:
    """int64, places of each store in a block of `MIX_BLOCK` samples: its weight's share, rounded so that all are taken.

    Raises UserError for a weight so small that its store would never be read, with the smallest that is possible.
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
            f"{MIX_BLOCK:,}, so that its store would never be read: raise it to {float(smallest) * 1.001:.4g} or more, or remove the store"
        )
    return quota


def mix_note(weights: tuple[float, ...]) -> str | None:
    """Return a line for weights whose shares cannot be taken as they are; None where each is within 1 % of its own."""
    shares, taken = np.array(weights) / sum(weights), mix_quotas(weights) / MIX_BLOCK
    if (np.abs(taken - shares) <= 0.01 * shares).all():
        return None
    listed = ", ".join(f"{100 * own:.3g} % instead of {100 * share:.3g} %" for own, share in zip(taken, shares, strict=True))
    return f"data.mix is taken in steps of 1/{MIX_BLOCK:,}: {listed}"
