"""Prediction of a symbol from its context by counting: what a model must beat to have learned more than frequencies.

A chain is a sequence of contexts, each finer than the one before: for an image code (position), (position, left code),
(position, left code, code above). Counts of a context are smoothed with the prediction of the next coarser one (back-off
with a Dirichlet prior: MacKay & Peto 1995). Several chains are mixed. Both the strengths of the priors and the mixture's
weights are those that predict each counted item best from the counts of all others (leave-one-out), so nothing but the
counted items is used.

Legend: n items.
"""

from collections.abc import Sequence

import numpy as np

#: Contexts of n items per chain and level, coarsest first, int64 [n] each.
Chains = Sequence[Sequence[np.ndarray]]

_STRENGTHS = 2.0 ** np.arange(-3, 11)  # of the prior, in items
_FITTED_ITEMS = 50_000  # items that strengths and weights are fitted to
_EM_STEPS = 20


class ContextCounts:
    """Smoothed counts of symbols in nested contexts."""

    def __init__(self, chains: Chains, symbols: np.ndarray, size: int) -> None:
        """Count and fit.

        Args:
            chains: Contexts of the counted items.
            symbols: The counted items, int64 [n] in 0 … size − 1.
            size: Number of different symbols.
        """
        self._frequencies = _Frequencies(symbols, size)
        self._chains = [[_Level(context, symbols, size) for context in chain] for chain in chains]
        fitted = np.random.default_rng(0).permutation(len(symbols))[:_FITTED_ITEMS]
        part = [[context[fitted] for context in chain] for chain in chains]
        found = np.stack([self._fit(own, contexts, symbols[fitted]) for own, contexts in zip(self._chains, part, strict=True)])
        self._weights = _mixture_weights(found)

    def _fit(self, levels: list["_Level"], contexts: Sequence[np.ndarray], symbols: np.ndarray) -> np.ndarray:
        """Choose each level's strength. Return the probability of each item by the counts of the others, float64 [n]."""
        p_n = self._frequencies.probabilities(symbols, left_out=1)
        for level, context in zip(levels, contexts, strict=True):
            options = [level.probabilities(context, symbols, p_n, strength, left_out=1) for strength in _STRENGTHS]
            best = int(np.argmax([np.log(option).sum() for option in options]))
            level.strength, p_n = float(_STRENGTHS[best]), options[best]
        return p_n

    def probabilities(self, chains: Chains, symbols: np.ndarray) -> np.ndarray:
        """Return the probability of each symbol in its context, float64 [n]."""
        return self._weights @ np.stack([self._of_chain(*pair, symbols) for pair in zip(self._chains, chains, strict=True)])

    def bits(self, chains: Chains, symbols: np.ndarray) -> np.ndarray:
        """Return −log2 of the probability of each symbol in its context, float64 [n]."""
        return -np.log2(self.probabilities(chains, symbols))

    def most_likely(self, chains: Chains, count: int) -> np.ndarray:
        """Return the most probable symbol of each of `count` contexts, int64 [n].

        The symbols that are compared are the most frequent ones of each level.
        """
        options = [np.full(count, self._frequencies.best)]
        options += [
            level.most_frequent(context, options[0])
            for levels, chain in zip(self._chains, chains, strict=True)
            for level, context in zip(levels, chain, strict=True)
        ]
        scores = np.stack([self.probabilities(chains, option) for option in options])
        return np.take_along_axis(np.stack(options), scores.argmax(0)[None], 0)[0]

    def _of_chain(self, levels: list["_Level"], contexts: Sequence[np.ndarray], symbols: np.ndarray) -> np.ndarray:
        p_n = self._frequencies.probabilities(symbols)
        for level, context in zip(levels, contexts, strict=True):
            p_n = level.probabilities(context, symbols, p_n, level.strength)
        return p_n


class _Frequencies:
    """Frequencies of symbols without context, smoothed by adding one half."""

    def __init__(self, symbols: np.ndarray, size: int) -> None:
        self._counts = np.bincount(symbols, minlength=size).astype(np.float64)
        self.best = int(self._counts.argmax())

    def probabilities(self, symbols: np.ndarray, left_out: int = 0) -> np.ndarray:
        total = self._counts.sum() - left_out + 0.5 * len(self._counts)
        return (self._counts[symbols] - left_out + 0.5) / total


class _Level:
    """Counts of the symbols in each context of one level."""

    def __init__(self, context: np.ndarray, symbols: np.ndarray, size: int) -> None:
        self.strength = 1.0
        self._size = size
        self._keys, self._counts = np.unique(context * size + symbols, return_counts=True)
        own = self._keys // size
        self._contexts, starts = np.unique(own, return_index=True)
        self._totals = np.add.reduceat(self._counts, starts) if len(own) else self._counts
        last_of_context = np.lexsort((self._counts, own))[np.append(starts[1:], len(own)) - 1] if len(own) else starts
        self._best = self._keys[last_of_context] % size

    def probabilities(
        self, context: np.ndarray, symbols: np.ndarray, coarser_n: np.ndarray, strength: float, left_out: int = 0
    ) -> np.ndarray:
        """Return the probability of each symbol, given that of the next coarser level, float64 [n].

        `left_out` is 1 to leave out the item itself, which must have been counted.
        """
        counts = _found(self._keys, self._counts, context * self._size + symbols)
        totals = _found(self._contexts, self._totals, context)
        return (counts - left_out + strength * coarser_n) / (totals - left_out + strength)

    def most_frequent(self, context: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        """Return the most frequent symbol of each context. A context that was not counted gets `otherwise`."""
        return np.where(_found(self._contexts, self._totals, context) > 0, _found(self._contexts, self._best, context), otherwise)


def _found(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the value of each wanted key, and 0 for keys that are not in the ascending `keys`."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def _mixture_weights(probabilities_cn: np.ndarray) -> np.ndarray:
    """Return the weights of the chains that predict the items best, float64 [chains], by expectation maximisation."""
    weights = np.full(len(probabilities_cn), 1 / len(probabilities_cn))
    for _ in range(_EM_STEPS if probabilities_cn.shape[1] else 0):
        shares = weights[:, None] * probabilities_cn
        weights = (shares / shares.sum(0)).mean(1)
    return weights


# ---- contexts


def code_positions(codes: np.ndarray) -> Chains:
    """Return the positions of image codes, int64 [images, codes per image], as one chain of one level."""
    return [[np.tile(np.arange(codes.shape[1]), len(codes))]]


def code_contexts(codes: np.ndarray, size: int) -> Chains:
    """Return position, left code and code above of image codes, int64 [images, codes per image].

    The codes are in row-major order. If their number is not a square, an image is one row. The border is a further code.
    """
    images, count = codes.shape
    side = int(np.sqrt(count))
    side = side if side * side == count else count
    grid = codes.reshape(images, count // side, side)
    left = np.pad(grid[:, :, :-1], ((0, 0), (0, 0), (1, 0)), constant_values=size).reshape(-1)
    above = np.pad(grid[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=size).reshape(-1)
    (position,) = code_positions(codes)[0]
    both = left * (size + 1) + above
    complete = position * (size + 1) ** 2 + both
    return [[position, position * (size + 1) + left, complete], [left, both, complete]]


def token_contexts(tokens: np.ndarray, size: int) -> Chains:
    """Return the contexts of a text's tokens, int64 [n]: the token before, with the one before that; and the position."""
    before = np.concatenate([[size], tokens[:-1]])
    before_that = np.concatenate([[size], before[:-1]])
    return [[before, before * (size + 1) + before_that], [np.arange(len(tokens))]]


def neighbour_contexts(tokens: np.ndarray, places: np.ndarray, size: int) -> Chains:
    """Return the contexts of a text's tokens at `places`: the token to the left, that to the right, and both.

    Args:
        tokens: What is visible, int64 [n] in 0 … size; a masked token is a symbol too.
        places: Indices of the tokens whose contexts are wanted, int64 [m].
        size: Number of different tokens. It also stands for the text's borders.
    """
    padded = np.concatenate([[size], tokens, [size]])
    left, right = padded[places], padded[places + 2]
    both = left * (size + 1) + right
    return [[left, both], [right, both]]


def class_contexts(labels: np.ndarray, masked: np.ndarray | None, size: int) -> Chains:
    """Return the contexts of an image's region classes: the most frequent class of the visible regions; and the place.

    Args:
        labels: Classes, int64 [n].
        masked: The regions whose contexts are wanted, bool [n]; the others are visible. None: each region, with all
            others visible.
        size: Number of classes. It also stands for none visible.
    """
    if masked is None:
        counts = np.bincount(labels, minlength=size)
        others = counts[None, :] - (np.arange(size)[None, :] == labels[:, None])
        most = np.where(len(labels) > 1, others.argmax(1), size)
        return [[most], [np.arange(len(labels))]]
    places, visible = np.flatnonzero(masked), labels[~masked]
    most_visible = int(np.bincount(visible, minlength=size).argmax()) if len(visible) else size
    return [[np.full(len(places), most_visible)], [places]]


def joined_chains(parts: Sequence[Chains], levels: Sequence[int]) -> Chains:
    """Return the contexts of several texts or images as one. `levels` is the number of levels of each chain."""
    empty = np.empty(0, np.int64)
    return [
        [np.concatenate([part[chain][level] for part in parts]) if parts else empty for level in range(depth)]
        for chain, depth in enumerate(levels)
    ]
