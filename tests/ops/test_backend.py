"""The choice of kernels, and the seeding of PyTorch's dropout."""

import pytest
import torch

from opt_ds.errors import UserError
from opt_ds.ops import backend


def test_auto_chooses_for_every_operator() -> None:
    chosen = backend.choose("auto")
    assert set(chosen) == set(backend.OPERATORS) and set(chosen.values()) <= set(backend.BACKENDS)
    assert backend.describe() == chosen


def test_the_truth_can_always_be_asked_for() -> None:
    try:
        assert set(backend.choose("torch").values()) == {"torch"}
    finally:
        backend.choose("auto")


def test_an_unknown_backend_is_one_line_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r'ops.backend "torhc" is unknown \(did you mean "torch"\?\)') as error:
        backend.choose("torhc")
    assert "\n" not in str(error.value)


def test_dropout_is_a_function_of_seed_step_rank_and_micro_batch() -> None:
    def draw(*keys: int) -> list[float]:
        backend.seed_dropout(*keys)
        return torch.rand(4).tolist()

    first = draw(1, 2, 3, 4)
    assert draw(1, 2, 3, 4) == first
    others = [draw(2, 2, 3, 4), draw(1, 3, 3, 4), draw(1, 2, 4, 4), draw(1, 2, 3, 5), draw(1, 2, 4, 3)]
    assert len({tuple(x) for x in [first, *others]}) == 6
