"""Captions as words, and negatives of a caption: with two words swapped, or with a word of another caption in it.

Yuksekgonul et al. 2023 (NegCLIP) exchange words of the same part of speech. Here an exchange is plausible if every run
of two or three words of the result occurs in some caption of the training split. No tagger is required, and the text
alone does not give such a negative away. Frequent words are exchanged less often, by the root of their frequency (as
Mikolov et al. 2013 subsample them). If no exchange of the wanted kind is plausible, a plausible one of the other kind is
taken, and otherwise the least implausible one.

A synonym in place of a word, or a swap around "and", leaves a caption true. Such negatives cannot be told from others
without knowing what the words mean.

Words begin at the WordPieces that do not continue a word. A negative has as many tokens as the caption, so the step
plan knows its length without reading it. It is a pure function of the caption, the other caption and the key.

Legend: n tokens of a text, w words, x exchanges.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from opt_ds.data.derived import cached_array
from opt_ds.data.modalities import TEXT
from opt_ds.modalities.text import ordinary_ids
from opt_ds.ops.keyed import keyed_choice, keyed_hash, keyed_uniform
from opt_ds.store.reader import FeatureStore
from opt_ds.store.tokenizer import checked_tokenizer

#: Exchanges of words, in the order of their numbers in a step plan.
SWAP, REPLACE = range(2)
_CONTINUES = "##"  # begins a WordPiece that continues a word
_EDGE = np.uint64(0)  # stands before the first and after the last word
_BLOCK = 65_536  # texts
_MOST_EXCHANGES = 96  # that are compared for a negative
_TRIES = 16


class _Words(NamedTuple):
    """Words of one text, or of several texts one after the other."""

    starts: np.ndarray  # int64 [w], index of the first token
    sizes: np.ndarray  # int64 [w], number of tokens
    hashes: np.ndarray  # uint64 [w], equal for equal words


@lru_cache(maxsize=32)
def captions_of(store: FeatureStore, split: str, max_tokens: int) -> "Captions":
    """Return the captions of a store. What is derived from its texts is computed once (see `opt_ds.data.derived`)."""
    return Captions(store, split, max_tokens)


class Captions:
    """The captions of a store: which are true of a sample, and negatives of them."""

    def __init__(self, store: FeatureStore, split: str, max_tokens: int) -> None:
        """Derive what the negatives require from all texts of the store.

        Args:
            store: The store.
            split: The training split, whose captions say which words may be neighbours.
            max_tokens: Longest text that the model reads. Longer ones are truncated before they are compared.
        """
        self._store, self._max_tokens, self._groups = store, max_tokens, store.groups
        self._continues = _continuations(store)
        tokenizer, vocab_size = store.description.tokenizer, store.description.dims.vocab_size
        self._ordinary = ordinary_ids(tokenizer, vocab_size)
        #: uint64 [text rows], hash of each text.
        self._contents = cached_array(store, "captions", [max_tokens], self._find_contents)
        #: uint64, ascending: hashes of group and text of every sample.
        self._true = cached_array(store, "true-captions", [max_tokens], self._find_true)
        #: uint64, ascending: hashes of all runs of two or three words.
        self._runs = cached_array(store, "word-runs", [split, max_tokens], partial(self._find_runs, split))
        #: uint64 [2, words]: hashes of the words, ascending, and how often each occurs.
        self._counts = cached_array(store, "word-counts", [split, max_tokens], partial(self._count_words, split))
        counts = cached_array(store, "caption-counts", [split, max_tokens], partial(self._count_captions, split))
        #: Captions of the training split, and those of them without two different words.
        self.num_captions, self.num_without_swap = counts.tolist()

    # ---- true captions

    def are_true(self, sample: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return whether the text rows [b] are captions of the samples [b] or of their groups, bool [b]."""
        return _contains(self._true, keyed_hash("truth", self._groups[sample], self._contents[rows]))

    def is_true(self, sample: int, ids: np.ndarray) -> bool:
        """Return whether a text is a caption of the sample or of its group."""
        content = _contents(ids, np.array([len(ids)]))
        return bool(_contains(self._true, keyed_hash("truth", self._groups[sample], content))[0])

    # ---- negatives

    def negative(self, ids: np.ndarray, other: np.ndarray, exchange: int, sample: int, key: int) -> np.ndarray:
        """Return a caption of the same length that is no true caption of the sample.

        If the exchange is not possible, the other one is taken; if neither is, a random token replaces one. In a store in
        which each text of so few tokens is true of the sample, the result is true as well.

        Args:
            ids: int64 [n], the sample's caption, n >= 1.
            other: int64, a caption whose words may be inserted.
            exchange: SWAP or REPLACE.
            sample: Index of the sample.
            key: Key of the random choices.

        Returns:
            int64 [n].
        """
        words = self._words(ids, np.array([len(ids)]))
        kinds = [partial(self._swaps, ids, words, key), partial(self._replacements, ids, words, other, key)]
        found: list[tuple[int, np.ndarray]] = []
        for kind in kinds if exchange == SWAP else reversed(kinds):
            edits = kind()
            for implausible, changed in edits:
                if not implausible and not self.is_true(sample, changed):
                    return changed
            found += edits
        for _, changed in [*found, *self._random_replacements(ids, key)]:
            if not self.is_true(sample, changed):
                break
        return changed

    def _swaps(self, ids: np.ndarray, words: _Words, key: int) -> list[tuple[int, np.ndarray]]:
        """Return captions with two different words swapped, as `_edits`."""
        i, j = np.triu_indices(len(words.hashes), 1)
        differ = words.hashes[i] != words.hashes[j]
        i, j = i[differ], j[differ]
        scale = self._scale(words.hashes)
        rank = keyed_uniform(key, "swap", i, j) * scale[i] * scale[j]
        kept = np.argsort(rank)[:_MOST_EXCHANGES]
        i, j, rank = i[kept], j[kept], rank[kept]
        hashes_xw = np.tile(words.hashes, (len(i), 1))
        each = np.arange(len(i))
        hashes_xw[each, i], hashes_xw[each, j] = words.hashes[j], words.hashes[i]
        parts = np.split(ids, words.starts[1:])

        def swapped(place: int) -> np.ndarray:
            changed = list(parts)
            changed[i[place]], changed[j[place]] = parts[j[place]], parts[i[place]]
            return np.concatenate(changed)

        return self._edits(hashes_xw, rank, np.zeros(len(i)), swapped)

    def _replacements(
        self, ids: np.ndarray, words: _Words, other: np.ndarray, key: int
    ) -> list[tuple[int, np.ndarray]]:
        """Return captions with one word replaced by one of as many tokens of the other caption, as `_edits`.

        Of the other caption's words, the one at the most similar place comes first.
        """
        theirs = self._words(other, np.array([len(other)]))
        i, j = (place.reshape(-1) for place in np.indices((len(words.hashes), len(theirs.hashes))))
        fits = (words.sizes[i] == theirs.sizes[j]) & (words.hashes[i] != theirs.hashes[j])
        i, j = i[fits], j[fits]
        rank = keyed_uniform(key, "replace", i) * self._scale(words.hashes)[i]
        distance = np.abs((i + 0.5) / len(words.hashes) - (j + 0.5) / max(1, len(theirs.hashes)))
        kept = np.lexsort((distance, rank))[:_MOST_EXCHANGES]
        i, j, rank, distance = i[kept], j[kept], rank[kept], distance[kept]
        hashes_xw = np.tile(words.hashes, (len(i), 1))
        hashes_xw[np.arange(len(i)), i] = theirs.hashes[j]

        def replaced(place: int) -> np.ndarray:
            start, source, size = words.starts[i[place]], theirs.starts[j[place]], theirs.sizes[j[place]]
            changed = ids.copy()
            changed[start : start + size] = other[source : source + size]
            return changed

        return self._edits(hashes_xw, rank, distance, replaced)

    def _edits(
        self, hashes_xw: np.ndarray, rank: np.ndarray, distance: np.ndarray, edited: Callable[[int], np.ndarray]
    ) -> list[tuple[int, np.ndarray]]:
        """Return the first exchanges: the number of runs of words that no caption has, and the tokens.

        The most plausible ones come first, then those of the smallest rank and distance.

        Args:
            hashes_xw: Hashes of the words after each exchange.
            rank: float64 [x], random, and large for frequent words.
            distance: float64 [x].
            edited: Returns the tokens of an exchange.
        """
        edges = np.full((len(hashes_xw), 1), _EDGE)
        runs = _runs(np.concatenate([edges, hashes_xw, edges], axis=1))
        implausible = sum((~_contains(self._runs, each)).sum(1) for each in runs)
        order = np.lexsort((distance, rank, implausible))[:_TRIES].tolist()
        return [(int(implausible[place]), edited(place)) for place in order]

    def _random_replacements(self, ids: np.ndarray, key: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the caption with one token replaced by a random one; as of `_edits`."""
        for attempt in range(_TRIES):
            changed, place = ids.copy(), int(keyed_choice(len(ids), key, "place", attempt))
            others = self._ordinary[self._ordinary != ids[place]]
            changed[place] = others[keyed_choice(len(others), key, "token", attempt)]
            yield 0, changed

    # ---- words

    def _scale(self, hashes: np.ndarray) -> np.ndarray:
        """Return the root of each word's frequency up to a factor, float64 [w]."""
        place = np.minimum(np.searchsorted(self._counts[0], hashes), max(0, self._counts.shape[1] - 1))
        if not self._counts.shape[1]:
            return np.ones(len(hashes))
        return np.sqrt(np.where(self._counts[0][place] == hashes, self._counts[1][place], 1))

    def _words(self, tokens: np.ndarray, lengths: np.ndarray) -> _Words:
        """Return the words of texts of these lengths, whose tokens are concatenated."""
        begins = ~self._continues[tokens]
        begins[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        starts = np.flatnonzero(begins)
        sizes = np.diff(np.append(starts, len(tokens)))
        place = np.arange(len(tokens)) - np.repeat(starts, sizes)
        return _Words(starts, sizes, _combined(keyed_hash("word", place, tokens), starts, sizes))

    def _find_contents(self) -> np.ndarray:
        rows = np.arange(len(self._store.lengths("text")))
        return np.concatenate([np.empty(0, np.uint64), *(_contents(*block) for block in self._blocks(rows))])

    def _find_true(self) -> np.ndarray:
        rows = np.asarray(self._store.rows[:, TEXT])
        with_text = np.flatnonzero(rows >= 0)
        return np.unique(keyed_hash("truth", self._groups[with_text], self._contents[rows[with_text]]))

    def _find_runs(self, split: str) -> np.ndarray:
        found = np.empty(0, np.uint64)
        for tokens, lengths in self._blocks(self._rows_of(split)):
            hashes, begins = self._words_by_text(tokens, lengths)
            # One row of words, with an edge before each text and one after the last.
            place = np.arange(len(hashes)) + np.cumsum(begins)
            row = np.full(len(hashes) + int(begins.sum()) + 1, _EDGE)
            row[place] = hashes
            two, three = _runs(row[None])
            crosses = row[1:-1] == _EDGE  # the middle of three words is between two texts
            found = np.union1d(found, np.concatenate([two[0], three[0][~crosses]]))
        return found

    def _count_words(self, split: str) -> np.ndarray:
        words, counts = np.empty(0, np.uint64), np.empty(0, np.uint64)
        for block in self._blocks(self._rows_of(split)):
            words, inverse = np.unique(np.concatenate([words, found := self._words(*block).hashes]), return_inverse=True)
            ones = np.ones(len(found), np.uint64)
            counts = np.bincount(inverse, np.concatenate([counts, ones]), len(words)).astype(np.uint64)
        return np.stack([words, counts])

    def _count_captions(self, split: str) -> np.ndarray:
        rows, total, several = self._rows_of(split), 0, 0
        for tokens, lengths in self._blocks(rows):
            hashes, begins = self._words_by_text(tokens, lengths)
            first = np.flatnonzero(begins)
            total += len(lengths)
            if first.size:
                several += int((np.minimum.reduceat(hashes, first) != np.maximum.reduceat(hashes, first)).sum())
        return np.array([total, total - several])

    def _words_by_text(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes of the words of texts, and which words are the first one of their text."""
        words = self._words(tokens, lengths)
        text = np.searchsorted(np.cumsum(lengths), words.starts, side="right")
        return words.hashes, np.diff(text, prepend=-1) != 0

    def _rows_of(self, split: str) -> np.ndarray:
        """Return the text rows of a split, ascending."""
        rows = np.unique(self._store.rows[self._store.split_samples(split), TEXT])
        return rows[rows >= 0]

    def _blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the truncated texts of these rows in blocks: tokens, concatenated, and lengths, both int64."""
        for start in range(0, len(rows), _BLOCK):
            texts = [self._store.text(row)[: self._max_tokens] for row in rows[start : start + _BLOCK].tolist()]
            yield np.concatenate(texts).astype(np.int64), np.array([len(text) for text in texts], dtype=np.int64)


def _contents(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a hash of each text, uint64. The texts' tokens are concatenated."""
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(tokens)) - np.repeat(starts, lengths)
    return _combined(keyed_hash("caption", place, tokens), starts, lengths)


def _combined(hashes: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return one hash for each run of hashes, uint64; 0 for an empty run."""
    found = np.zeros(len(lengths), np.uint64)
    filled = lengths > 0
    if filled.any():
        found[filled] = np.bitwise_xor.reduceat(hashes, starts[filled])
    return found


def _runs(hashes_xw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of each two and each three neighbouring words, uint64 [x, w − 1] and [x, w − 2]."""
    two = keyed_hash("words", hashes_xw[:, :-1], hashes_xw[:, 1:])
    return two, keyed_hash("words", two[:, :-1], hashes_xw[:, 2:])


def _contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return which values are in an ascending array, bool of the same shape."""
    if not len(ascending):
        return np.zeros(values.shape, dtype=bool)
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[place] == values


def _continuations(store: FeatureStore) -> np.ndarray:
    """Return which ids of the vocabulary continue a word, bool. An assumed store has no tokenizer: none does."""
    folder = getattr(store, "tokenizer_folder", None)
    vocabulary = checked_tokenizer(folder).get_vocab() if folder is not None else {}
    continues = np.zeros(max(store.description.dims.vocab_size, len(vocabulary)), dtype=bool)
    continues[[index for token, index in vocabulary.items() if token.startswith(_CONTINUES)]] = True
    return continues
