"""Random choices that are the same on every machine and Python version: they use `random.Random.random` alone."""

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Choices:
    """A sequence of random choices, determined by the values that it is made with."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
        self._random = random.Random(int.from_bytes(digest, "little"))

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self._random.random() < probability

    def below(self, count: int) -> int:
        """Return one of 0 … count − 1."""
        return int(self._random.random() * count)

    def between(self, low: float, high: float) -> float:
        """Return a number from low to high."""
        return low + (high - low) * self._random.random()

    def one_of(self, items: Sequence[Item]) -> Item:
        """Return one of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Iterable[Item]) -> list[Item]:
        """Return the items in random order."""
        keyed = [(self._random.random(), place, item) for place, item in enumerate(items)]
        return [item for _, _, item in sorted(keyed, key=lambda entry: entry[:2])]

    def weighted(self, weights: Mapping[Item, float]) -> Item:
        """Return a key, with a probability in proportion to its weight."""
        left = self._random.random() * sum(weights.values())
        for item, weight in weights.items():
            left -= weight
            if left < 0:
                return item
        return item


def stable_hash(*key: object) -> int:
    """Return 64 bits that depend on the values only."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
