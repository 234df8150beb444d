"""Captions as words, and negatives of a caption: with two words swapped, or with a word of another caption in it.

Yuksekgonul et al. 2023 (NegCLIP) exchange words of the same part of speech. Here words are exchangeable if the result
is plausible: if every two words that become neighbours are neighbours in some caption of the training split. No tagger
is required, and the text alone does not give a negative away. If no exchange is plausible, the least implausible one
is taken.

Words begin at the WordPieces that do not continue a word. A negative has as many tokens as the caption, so the step
plan knows its length without reading it. It is a pure function of the caption, the other caption and the key.

Legend: n tokens of a text, w words.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from opt_ds.data.derived import cached_array
from opt_ds.data.modalities import TEXT
from opt_ds.modalities.text import ordinary_ids
from opt_ds.ops.keyed import keyed_choice, keyed_hash
from opt_ds.store.reader import FeatureStore
from opt_ds.store.tokenizer import checked_tokenizer

#: Exchanges of words, in the order of their numbers in a step plan.
SWAP, REPLACE = range(2)
_CONTINUES = "##"  # begins a WordPiece that continues a word
_EDGE = np.uint64(0)  # stands before the first and after the last word
_BLOCK = 65_536  # texts
_MOST_PAIRS = 256  # pairs of words that are compared for a swap
_MOST_WORDS = 16  # words of a caption that are compared for a replacement
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
        #: uint64, ascending: hashes of neighbouring words.
        self._pairs = cached_array(store, "word-pairs", [split, max_tokens], partial(self._find_pairs, split))
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

        If the exchange is not possible, the other one is taken; if neither is, a random token replaces one.

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
        swaps, replacements = self._swaps(ids, words, key), self._replacements(ids, words, other, key)
        first, second = (swaps, replacements) if exchange == SWAP else (replacements, swaps)
        changed = ids
        for edits in (first, second, self._random_replacements(ids, key)):
            for changed in edits:
                if not self.is_true(sample, changed):
                    return changed
        return changed  # in a store with all texts of so few tokens

    def _swaps(self, ids: np.ndarray, words: _Words, key: int) -> Iterator[np.ndarray]:
        """Yield the caption with two different words swapped, the most plausible results first."""
        i, j = np.triu_indices(len(words.hashes), 1)
        differ = words.hashes[i] != words.hashes[j]
        i, j = i[differ], j[differ]
        rank = keyed_hash(key, "swap", i, j)
        if len(rank) > _MOST_PAIRS:
            kept = np.argpartition(rank, _MOST_PAIRS)[:_MOST_PAIRS]
            i, j, rank = i[kept], j[kept], rank[kept]
        plausible = self._plausible_swaps(words.hashes, i, j)
        parts = np.split(ids, words.starts[1:])
        for place in np.lexsort((rank, -plausible))[:_TRIES].tolist():
            swapped = list(parts)
            swapped[i[place]], swapped[j[place]] = parts[j[place]], parts[i[place]]
            yield np.concatenate(swapped)

    def _plausible_swaps(self, hashes: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Return how many of the four new pairs of neighbours some caption has, for swaps of words i < j."""
        own, i, j = np.concatenate([[_EDGE], hashes, [_EDGE]]), i + 1, j + 1
        one, other, adjacent = own[i], own[j], j == i + 1
        left = np.concatenate([own[i - 1], other, np.where(adjacent, other, own[j - 1]), one])
        right = np.concatenate([other, np.where(adjacent, one, own[i + 1]), one, own[j + 1]])
        return self._are_neighbours(left, right).reshape(4, -1).sum(0)

    def _replacements(self, ids: np.ndarray, words: _Words, other: np.ndarray, key: int) -> Iterator[np.ndarray]:
        """Yield the caption with one word replaced by one of as many tokens of the other caption.

        The most plausible results come first; then the random order of the caption's words, and of the other caption's
        words the one at the most similar place.
        """
        theirs = self._words(other, np.array([len(other)]))
        rank = keyed_hash(key, "replace", np.arange(len(words.hashes)))
        chosen = np.argsort(rank)[:_MOST_WORDS]
        i, j = (places.reshape(-1) for places in np.meshgrid(chosen, np.arange(len(theirs.hashes)), indexing="ij"))
        fits = (words.sizes[i] == theirs.sizes[j]) & (words.hashes[i] != theirs.hashes[j])
        i, j = i[fits], j[fits]
        own = np.concatenate([[_EDGE], words.hashes, [_EDGE]])
        word = theirs.hashes[j]
        pairs = np.concatenate([own[i], word]), np.concatenate([word, own[i + 2]])
        plausible = self._are_neighbours(*pairs).reshape(2, -1).sum(0)
        distance = np.abs((i + 0.5) / len(words.hashes) - (j + 0.5) / max(1, len(theirs.hashes)))
        for place in np.lexsort((distance, rank[i], -plausible))[:_TRIES].tolist():
            start, source, size = words.starts[i[place]], theirs.starts[j[place]], theirs.sizes[j[place]]
            changed = ids.copy()
            changed[start : start + size] = other[source : source + size]
            yield changed

    def _random_replacements(self, ids: np.ndarray, key: int) -> Iterator[np.ndarray]:
        """Yield the caption with one token replaced by a random one."""
        for attempt in range(_TRIES):
            changed, place = ids.copy(), int(keyed_choice(len(ids), key, "place", attempt))
            others = self._ordinary[self._ordinary != ids[place]]
            changed[place] = others[keyed_choice(len(others), key, "token", attempt)]
            yield changed

    # ---- words

    def _are_neighbours(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return whether some caption has the words next to each other, bool [pairs]."""
        return _contains(self._pairs, _hash_of_pair(left, right))

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

    def _find_pairs(self, split: str) -> np.ndarray:
        pairs = np.empty(0, np.uint64)
        for tokens, lengths in self._blocks(self._rows_of(split)):
            hashes, begins = self._words_by_text(tokens, lengths)
            left = np.where(begins, _EDGE, np.roll(hashes, 1))
            last = hashes[np.roll(begins, -1)]  # the word before the first one of the next text
            found = _hash_of_pair(left, hashes), _hash_of_pair(last, np.full_like(last, _EDGE))
            pairs = np.union1d(pairs, np.concatenate(found))
        return pairs

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


def _hash_of_pair(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return keyed_hash("pair", left, right)


def _contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return which values are in an ascending array, bool."""
    if not len(ascending):
        return np.zeros(len(values), dtype=bool)
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[place] == values


def _continuations(store: FeatureStore) -> np.ndarray:
    """Return which ids of the vocabulary continue a word, bool. An assumed store has no tokenizer: none does."""
    folder = getattr(store, "tokenizer_folder", None)
    vocabulary = checked_tokenizer(folder).get_vocab() if folder is not None else {}
    continues = np.zeros(max(store.description.dims.vocab_size, len(vocabulary)), dtype=bool)
    continues[[index for token, index in vocabulary.items() if token.startswith(_CONTINUES)]] = True
    return continues
