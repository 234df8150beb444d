"""A step's one loss: weights, global counts, ranks."""

import pytest
import torch

from opt_ds.tasks.base import LossTerm, classification_term, total_loss
from tests.tiny import make_config


def term(value: float, count: float = 1.0) -> LossTerm:
    return LossTerm(torch.tensor(value, requires_grad=True), count, {})


def test_the_total_is_the_weighted_sum_of_global_means() -> None:
    tasks = make_config(tasks={"mlm": {"weight": 2.0}, "mvm": {"weight": 0.5}, "mrc": {"weight": 3.0}}).tasks
    terms = {"mlm": term(10.0, 2), "mvfr": term(6.0, 3), "mrc": term(4.0, 3)}
    counts = {"mlm": 20.0, "mvfr": 12.0, "mrc": 12.0}  # of the complete batch, not of this part of it
    expected = 2.0 * 10 / 20 + 0.5 * 6 / 12 + 0.5 * 3.0 * 4 / 12
    for world_size in (1, 4):
        assert total_loss(terms, counts, tasks, world_size).item() == pytest.approx(world_size * expected)


def test_a_loss_that_is_off_or_has_no_terms_counts_0_and_keeps_its_gradient() -> None:
    tasks = make_config(tasks={"dir": {"weight": 0.0}}).tasks
    terms = {"mlm": term(0.0, 0), "dir": term(5.0, 64), "dtr": term(3.0, 3)}
    loss = total_loss(terms, {"mlm": 0.0, "dtr": 6.0}, tasks, 2)
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    assert [terms[name].sum.grad.item() for name in terms] == pytest.approx([0.0, 0.0, 2 / 6])


def test_classification_counts_its_hits() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    found = classification_term(scores, torch.tensor([0, 1, 1]))
    assert found.count == 3 and found.metrics["correct"] == 2
    assert found.sum.item() == pytest.approx(torch.log1p(torch.exp(torch.tensor([-2.0, -1.0, 2.0]))).sum().item())
    empty = classification_term(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.long))
    assert empty.sum.item() == 0.0 and empty.count == 0
