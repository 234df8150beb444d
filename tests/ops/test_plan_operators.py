"""The step plan's compiled operators return the same bits as the NumPy forms that explain them."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from opt_ds.data import micro_batches
from opt_ds.data.micro_batches import distribute
from opt_ds.ops import keyed
from opt_ds.ops.keyed import keyed_hash, permute
from opt_ds.ops.plan_operators import plan_operators

N = 3000  # above keyed._COMPILED_FROM


@pytest.fixture
def in_numpy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Runs a call without the compiled operators."""

    def run(call: Callable[[], Any]) -> Any:
        with monkeypatch.context() as context:
            for module in (keyed, micro_batches):
                context.setattr(module, "plan_operators", lambda: None)
            return call()

    yield run


def test_the_operators_are_built_here() -> None:
    """Otherwise the other tests of this file would compare NumPy with itself."""
    assert plan_operators() is not None


def test_hashes_are_the_same_bits(in_numpy: Callable[[Callable[[], Any]], Any]) -> None:
    rng = np.random.default_rng(0)
    key = rng.integers(0, 2**63, N).astype(np.uint64)
    for keys in (
        (key, "drop", 3, np.arange(N)),
        (key[:, None], "drop", 1, np.arange(3)[None, :]),
        (1, "sample", np.full(N, 2**40), np.arange(N) - 5),
        (np.broadcast_to(key[:1], N),),
    ):
        found, expected = keyed_hash(*keys), in_numpy(lambda keys=keys: keyed_hash(*keys))
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("count", [1, 2, N, 12_345, 2**33 + 1])
def test_permutations_are_the_same(count: int, in_numpy: Callable[[Callable[[], Any]], Any]) -> None:
    rng = np.random.default_rng(count % 97)
    index, epoch = rng.integers(0, count, N), rng.integers(0, 4, N)
    np.testing.assert_array_equal(
        permute(index, count, 7, "order", epoch), in_numpy(lambda: permute(index, count, 7, "order", epoch))
    )


def test_micro_batches_are_the_same(in_numpy: Callable[[Callable[[], Any]], Any]) -> None:
    rng = np.random.default_rng(4)
    for trial in range(25):
        n, world_size, budget = int(rng.integers(0, 1500)), int(rng.integers(1, 9)), int(rng.integers(300, 2000))
        lengths = rng.integers(1, 300, n)
        costs = None if trial % 3 == 0 else rng.random(n) * lengths
        arguments = (2 * np.arange(n), lengths, world_size, budget, costs)
        found, expected = distribute(*arguments), in_numpy(lambda arguments=arguments: distribute(*arguments))
        assert [[(m.indices.tolist(), m.num_tokens, m.cost) for m in rank] for rank in found] == [
            [(m.indices.tolist(), m.num_tokens, m.cost) for m in rank] for rank in expected
        ]


def test_a_cost_is_the_sum_that_numpy_gives() -> None:
    """Which of two nearly equal micro-batches comes first follows from the last bits of their sums."""
    rng = np.random.default_rng(5)
    costs = rng.random(2000)
    for rank in distribute(np.arange(2000), np.ones(2000, dtype=np.int64), 3, 200, costs):
        for micro_batch in rank:
            dearest_first = micro_batch.indices[np.argsort(-costs[micro_batch.indices], kind="stable")]
            assert micro_batch.cost == float(costs[dearest_first].sum())
